"""What a response's final answer is, and the cases of right or wrong that plain arithmetic settles at once.

Everything here is linear in the text and safe on hostile input; symbolic comparison is in worker.py.
"""

from __future__ import annotations

import re
from fractions import Fraction

from hpt_mega.rewards.verdict import Verdict

TAIL_CHARACTERS = 20_000  # a final answer stands at the end; what comes before this is never looked at
ANSWER_CHARACTERS = 1_000  # a longer final answer is refused
BETWEEN_CHARACTERS = 40  # that join two formulas or boxes to one answer
NUMBER_CHARACTERS = 64  # a longer number is left to the symbolic comparison

_MARK = re.compile(
    r"####|\banswer\s+(?:is|would\s+be|equals|becomes)\b:?|\banswer\**\s*:|\banswer\**\s*=(?!=)",
    re.IGNORECASE,
)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(rf"-?(?:{_DIGITS}(?:\.\d+)?|\.\d+)")
_PLAIN = re.compile(rf"([-+]?(?:{_DIGITS}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{{1,2}})?)(?:/([-+]?\d+))?")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")
_UNIT = re.compile(r"(?<=[\d.])\s+[A-Za-z]{4}[A-Za-z ]{0,40}$")  # 5abc is a product
_NO_UNIT = re.compile(
    r"\b(?:million|billion|trillion|thousand|hundred|dozen|percent|percentage|pct|cents?|hal(?:f|ves)|thirds?|"
    r"quarters?|\w+ths|squared|cubed|factorial|over|plus|minus|times|and|or|sin|cos|tan|log|exp|sqrt|mod|to)\b",
    re.IGNORECASE,
)
_WORDS = re.compile(r"\\(?:text|mathrm)\s*\{[^{}]*[A-Za-z]|(?<=[\d.])\s*[A-Za-z]{2}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$,;.]*(?:\\text\{)?\s*(?:and|or)?\s*\}?[\s$,;]*")
_CLAUSE = re.compile(r"\.\s|\.?$|[,;]?\s+(?:because|since|which|so that|as we|when|where|for all)\b")
_CONNECTED = re.compile(r"[\s,;]*(?:and|or)?[\s,;]*")
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_NAMED = re.compile(r"^[A-Za-z]\s*=\s*")
_DECORATION = re.compile(
    r"\\(?:text|mathrm|textbf)\{[^{}]{0,80}?[A-Za-z][^{}]{0,80}\}|\\[,!;: ]|\\left|\\right|\\?\$|~"
)
_OPERATOR = re.compile(r"(?<=[\d)}\s])(?:[-+*×·÷/]|\\times|\\cdot|\\div)(?=[\d(\s\\+{-])")
_PRODUCT = re.compile(r"(?<![\w.^}\\])(?:[\d.]+|\(\s*-?[\d.]+\s*\))\s*\(\s*-?[\d.]+\s*\)")  # 12(7)
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?\s*(?:\\times|\\cdot|\*|×)\s*\{?10\}?\s*\^\s*\{?-?\d+\}?")
_MIXED = re.compile(r"-?\d+\s+\d+\s*/\s*\d+")


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...}, braces balanced; "" where it never closes; None without one."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    content = _closed(text, boxes[-1].end())
    if content is None:
        return ""
    # "\boxed{2} and \boxed{3}" is one answer of two parts
    end = boxes[-1].start()
    for box in reversed(boxes[:-1][-9:]):
        earlier = _closed(text[:end], box.end())
        if earlier is None:
            break
        between = text[box.end() + len(earlier) + 1 : end]
        if len(between) > BETWEEN_CHARACTERS or not _BETWEEN_BOXES.fullmatch(between):
            break
        if earlier.strip() != content.strip():
            content = f"{earlier}, {content}"
        end = box.start()
    return content


def _closed(text: str, begin: int) -> str | None:
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def final_answer(response: str) -> str | None:
    r"""The last \boxed{...}, else the text after the last '####' or 'answer is', else what ends the response.

    That is the whole response where it is one line of mathematics, else its last line's formula at the end,
    else the last number.
    """
    text = response[-TAIL_CHARACTERS:]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    marks = list(_MARK.finditer(text))
    if marks:
        return _stated(text[marks[-1].end() :].strip().strip("*").lstrip(": "))
    line = text.strip().rsplit("\n", 1)[-1]
    if (formula := _last_formula(line)) is not None:
        return formula or None
    if (
        len(line) == len(response.strip()) <= ANSWER_CHARACTERS
        and "=" not in line
        and not _PROSE.search(line)
    ):
        return line.strip(" .*$") or None
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _last_formula(line: str) -> str | None:
    r"""Content of the $...$ or \(...\) that ends a line; None where the line ends otherwise."""
    match = re.search(r"(?:(?<!\\)\$([^$]+)\$|\\\(((?:(?!\\[()]).)+)\\\))[\s.*]*$", line)
    return (match[1] or match[2]).strip() if match else None


def _stated(text: str) -> str | None:
    """The answer at the start of what follows 'the answer is'."""
    for opening, closing in (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)")):
        if text.startswith(opening) and (end := text.find(closing, 2)) > 0:
            return text[2:end].strip() or None
    if text.startswith("$"):
        return _formula(text)
    line = text.split("\n", 1)[0]
    if r"\begin{" in line and line.count(r"\begin{") > line.count(r"\end{"):
        line = text[: text.rfind("}") + 1]  # a matrix over several lines
    return line.strip(" .*:").strip("$ ") or None


def _formula(text: str) -> str | None:
    r"""Content of the $...$ at the start, and of those joined to it by commas; \$ is no delimiter."""
    signs = [match.start() for match in re.finditer(r"(?<!\\)\$", text)]
    if len(signs) < 2:
        return text.split("\n", 1)[0].strip(" .*$") or None
    end = signs[1]
    for opening, closing in zip(signs[2::2], signs[3::2], strict=False):
        between = text[end + 1 : opening]
        if len(between) > BETWEEN_CHARACTERS or not _CONNECTED.fullmatch(between):
            break
        end = closing
    return text[1:end].strip() or None


def whole_formula(response: str) -> str | None:
    r"""All from the first $ after 'answer is' to a $ that ends the response: a gold answer may hold $."""
    text = response[-TAIL_CHARACTERS:].rstrip().rstrip(".").rstrip()
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    text = text[marks[-1].end() :].strip(" :*")
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" else None


def unboxed(answer: str) -> str:
    r"""A gold answer without the \boxed{...} or $...$ around it."""
    answer = answer.strip()
    if answer.startswith(r"\boxed") and answer.endswith("}") and (inside := last_boxed(answer)):
        answer = inside.strip()
    if len(answer) > 2 and answer[0] == answer[-1] == "$" and answer[-2] != "\\" and answer.count("$") == 2:
        answer = answer[1:-1].strip()
    return answer


def plain_number(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal or fraction; None where the text is anything else.

    Dollar signs, thousands commas, \text{...}, a unit behind and "x =" before do not count.
    """
    if _NO_UNIT.search(text):
        return None
    text = _DECORATION.sub(" ", text.replace("−", "-").replace("{,}", ",")).strip().rstrip(".").strip()
    text = _NAMED.sub("", text)
    text = _UNIT.sub("", text).strip()
    if len(text) > NUMBER_CHARACTERS:
        return None
    if match := _FRACTION.fullmatch(text):
        top, bottom = Fraction(f"{match[1]}1") * int(match[2]), Fraction(match[3])
        return top / bottom if bottom else None
    match = _PLAIN.fullmatch(text.replace(" /", "/").replace("/ ", "/"))
    if match is None:
        return None
    top, bottom = Fraction(match[1].replace(",", "")), Fraction(match[2] or 1)
    return top / bottom if bottom else None


def quick_verdict(response: str, answer: str) -> Verdict | None:
    """The verdict where text and exact arithmetic decide it; None where symbolic comparison is needed.

    An expression that merely restates the question (answer 19, response 12 + 7) is wrong: it would
    otherwise be the cheapest way to a reward on arithmetic questions.
    """
    answer = unboxed(answer)
    given = final_answer(response)
    is_boxed = last_boxed(response[-TAIL_CHARACTERS:]) is not None
    if not answer:
        return Verdict(0.0, "the gold answer is empty", given or "")
    whole = response[:TAIL_CHARACTERS].strip()
    if answer == given or (not is_boxed and answer in (whole_formula(response), whole)):
        return Verdict(1.0, "same text", answer)
    if given is None:
        return Verdict(0.0, "no final answer")
    if len(given) > ANSWER_CHARACTERS:
        why = f"final answer of {len(given)} characters, at most {ANSWER_CHARACTERS} are read"
        return Verdict(0.0, why, given)
    return _number_verdict(given, answer, is_boxed)


def _number_verdict(given: str, answer: str, is_boxed: bool) -> Verdict | None:
    """The verdict where the gold answer is a plain number; None where more than that decides."""
    expected = plain_number(answer)
    if expected is None:
        return None
    value = plain_number(given)
    if value is None and _is_unfinished(given):
        return Verdict(0.0, "an expression that is not worked out", given)
    if value is None and not is_boxed and _PROSE.search(given) and not re.search(r"[\\^/]", given):
        # "42 apples, because ...": the number of the first clause
        numbers = _NUMBER.findall(_CLAUSE.split(given, maxsplit=1)[0])
        value = plain_number(numbers[-1]) if numbers else None
    if value is not None:
        if value == expected:
            names = _NAMED.match(given), _NAMED.match(answer)
            if (names[0] and names[1]) or (_WORDS.search(given) and _WORDS.search(answer)):
                return None  # their names and units are compared too
            return Verdict(1.0, "same number", given)
        return _another(given, answer)
    return None


def _is_unfinished(given: str) -> bool:
    """Whether what is stated is arithmetic still to be done, however it is spaced, marked or named."""
    last = _DECORATION.sub(" ", given.rsplit("=", 1)[-1]).strip()
    last = _UNIT.sub("", last)
    if _SCIENTIFIC.match(last) or _MIXED.fullmatch(last) or _PROSE.search(last):
        return False
    return bool(_OPERATOR.search(last) or _PRODUCT.search(last))


def _another(given: str, answer: str) -> Verdict | None:
    """Wrong, unless a unit or the rounding of a fraction could still make it right."""
    is_rounded = ("." in given) != ("." in answer) and ("/" in given + answer or "frac" in given + answer)
    return None if _WORDS.search(given) or is_rounded else Verdict(0.0, "another number", given)


def exact_verdict(response: str, answer: str) -> Verdict:
    """Right where the final answer is the gold answer, character by character but for runs of white space."""
    boxed = last_boxed(response[-TAIL_CHARACTERS:])
    given = boxed if boxed is not None else _marked(response)
    if not answer.strip():
        return Verdict(0.0, "the gold answer is empty", (given or "").strip())
    if given is None:
        return Verdict(0.0, "no final answer")
    same = given.split() == answer.split()
    return Verdict(float(same), "same text" if same else "another text", given.strip())


def _marked(response: str) -> str | None:
    """What the last 'answer is' states; the whole response where nothing does."""
    text = response[-TAIL_CHARACTERS:]
    marks = list(_MARK.finditer(text))
    if not marks:
        return response if len(response) <= ANSWER_CHARACTERS else None
    return _stated(text[marks[-1].end() :].strip().strip("*").lstrip(": "))
