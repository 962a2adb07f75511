"""Questions with demonstrations, and the order in which they are served."""

from hpt_mega.data.loader import QuestionLoader
from hpt_mega.data.questions import QuestionSet, load_questions

__all__ = ["QuestionLoader", "QuestionSet", "load_questions"]
