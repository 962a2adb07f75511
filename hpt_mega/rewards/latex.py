r"""One spelling for the many that LaTeX and Unicode have of the same symbol, and splitting outside brackets.

Words of \text{...} come out between « and », braces of sets as ⦃ and ⦄, currency signs as ¤.
"""

from __future__ import annotations

import re
import unicodedata

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "＝": "=",
     "⩽": "≤", "⩾": "≥", "（": "(", "）": ")", "，": ",", "；": ";", "：": ":", "\u00a0": " ", "′": "'",
     "€": "¤", "£": "¤", "\t": " ", "\n": " ", "\r": " ", "«": " ", "»": " ", "º": "°"}
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_GREEK = {"π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "λ": r"\lambda ",
          "μ": r"\mu ", "ω": r"\omega ", "φ": r"\phi ", "γ": r"\gamma ", "σ": r"\sigma ",
          "√": r"\sqrt ", "τ": r"\tau "}  # fmt: skip
_SYMBOLS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "le": "≤", "leq": "≤", "leqslant": "≤", "leqq": "≤",
    "ge": "≥", "geq": "≥", "geqslant": "≥", "geqq": "≥", "lt": "<", "gt": ">", "ne": "≠", "neq": "≠",
    "infty": "∞", "infinity": "∞", "pm": "±", "mp": "∓", "cup": "∪", "in": "∈", "approx": "≈", "simeq": "≈",
    "equiv": "≡", "langle": "⟨", "rangle": "⟩", "lbrace": "⦃", "rbrace": "⦄", "lvert": "|", "rvert": "|",
    "vert": "|", "mid": "|", "degree": "°", "dfrac": r"\frac ", "tfrac": r"\frac ", "cfrac": r"\frac ",
    "dbinom": r"\binom ", "tbinom": r"\binom ", "varphi": r"\phi ", "varepsilon": r"\epsilon ", "land": ",",
    "lor": ",", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "colon": ":", "euro": "¤",
    "pounds": "¤", "emptyset": "∅", "varnothing": "∅", "setminus": "∖", "backslash": "∖", "wedge": ",",
}  # fmt: skip
_IGNORED = frozenset(
    re.findall(
        r"\S+",
        "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle quad qquad "
        "limits nolimits hspace vspace hfill thinspace bf it nonumber middle boldmath ",
    )
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|texttt|mathrm|mathbf|mathit|mathsf|mbox|hbox|bm"
    r"|boldsymbol|operatorname\*?|emph)\s*\{([^{}]*)\}"
)
_ROMAN = re.compile(r"\{\\(?:rm|bf|it)\s+([^{}]*)\}")
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_NAMES = re.compile(r"\\(?:mathbb|mathcal|mathfrak)\s*\{?([A-Z])\}?")
_DEGREE = re.compile(r"\^\s*(?:\{\s*(?:\\circ|°)\s*\}|\\circ(?![A-Za-z])|°)|\\circ(?![A-Za-z])")
_BETWEEN_NUMBERS = re.compile(r"(?<=\d)\s+(?=\d)(?!\d{3}(?!\d))")
_VULGAR = re.compile("[¼-¾⅐-⅞]")  # ½
_SPACES = re.compile(r"\\[,;:! ]|~|\\\n")
_WORDS = re.compile(r"«\s*(?:,?\s*)(and|or)\s*(?:,\s*)?»|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_MATH_LETTER = re.compile(r"[A-Za-z]'?")
_FUNCTIONS = frozenset(
    re.findall(
        r"\S+",
        "sin cos tan cot sec csc arcsin arccos arctan ln log exp sinh cosh tanh lg max min gcd lcm ",
    )
)


def normalise(text: str) -> str:
    r"""The text in one spelling; linear in its length, and never an error."""
    text = text.replace("{,}", ",").replace(r"\$", "¤").replace("$", " ").replace(r"\%", "%")
    text = re.sub(r"(?<=\d)\\[,!;](?=\d{3}(?!\d))", "", text)  # 1\,234
    text = _VULGAR.sub(_as_fraction, text).translate(_UNICODE)
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    for sign, name in _GREEK.items():
        text = text.replace(sign, name)
    text = _DEGREE.sub("°", text)
    for _ in range(3):  # \textbf{\text{...}}
        text = _ROMAN.sub(r"\\text{\1}", _TEXT.sub(_as_words, text))
    text = _NAMES.sub(r"«\1»", text).replace(r"\{", "⦃").replace(r"\}", "⦄").replace(r"\|", "|")
    text = _SPACES.sub(" ", text) if r"\begin" not in text else re.sub(r"\\[,;:!](?!\\)|~", " ", text)
    text = _COMMAND.sub(_as_symbol, text)
    text = text.replace("<=", "≤").replace(">=", "≥").replace("!=", "≠").replace("**", "^")
    text = _WORDS.sub(" , ", text)
    text = re.sub(r",\s*,", ",", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def _as_fraction(match: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("\N{FRACTION SLASH}")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _as_words(match: re.Match[str]) -> str:
    words = match[1].strip(" ~")
    if _MATH_LETTER.fullmatch(words) and match[0].startswith(r"\mathbf"):
        return words  # a vector's name
    if words in _FUNCTIONS:
        return f"\\{words} "
    if not re.search("[A-Za-z]", words):
        return words
    return f"«{words}»"


def _as_symbol(match: re.Match[str]) -> str:
    name = match[1]
    if name in _IGNORED:
        return " "
    return _SYMBOLS.get(name, match[0])


def squash(text: str) -> str:
    """Without what only spaces out or marks words: equal squashed texts are the same answer.

    A space between digits stays, for 2 3/4 is not 23/4, but before the three of 1 000.
    """
    text = _BETWEEN_NUMBERS.sub(";", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", re.sub(r"[\s«»]", "", text))
    return text.replace("{", "(").replace("}", ")")


def split_outside(text: str, separators: str) -> list[str]:
    """Pieces between separators outside all brackets; the text itself where brackets do not balance."""
    pieces, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "([{⦃⟨«":
            depth += 1
        elif character in ")]}⦄⟩»":
            depth -= 1
        elif depth == 0 and character in separators:
            pieces.append(text[start:position].strip())
            start = position + 1
    if depth != 0:
        return [text]
    return [*pieces, text[start:].strip()]


def wrapped(text: str) -> tuple[str, str, str] | None:
    """(opening bracket, content, closing bracket) where one pair wraps the whole text."""
    if len(text) < 2 or text[0] not in "([{⦃⟨" or text[-1] not in ")]}⦄⟩":
        return None
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{⦃⟨") - (character in ")]}⦄⟩")
        if depth == 0 and position < len(text) - 1:
            return None
    return (text[0], text[1:-1].strip(), text[-1]) if depth == 0 else None
