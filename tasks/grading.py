r"""Is a free-form answer right? "1/2" is 0.5, and \sqrt{12} is 2\sqrt{3}.

    read_boxed   the answer of a response that gives it in \boxed{...}
    tidy         an answer without what does not matter: dollar signs, blanks, a period
    same         is the given answer the true one?

An answer is a *value in the form that was asked for*: 3526*17 is no answer to "3526*17 = ?", though
it is equal. So `same` settles by itself what it can: equal texts, plain numbers, and what differs
in form (`other_form`). All else goes to the package math-verify, if it is installed, in a process
of its own (tasks/judge.py).
"""

import functools
import importlib.util
import re
from fractions import Fraction

from tasks.base import END
from tasks.judge import Judge

MAX_ANSWER = 1000  # characters; a longer answer is wrong


# ------------------------------------------------------------------- the answer in a response

_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


def read_boxed(text):
    r"""The content of the last complete `\boxed{...}` before any `END`, or None.

    The papers' graders read it so. Of boxes inside one another, the one that begins last is the
    last one. Takes linear time.
    """
    last_start, last_end = None, None
    starts = []  # one per open brace: where the content of a box begins, or None if it is no box's
    for brace in _BRACE.finditer(text.partition(END)[0]):
        if brace[0] in (r"\{", r"\}"):  # a set's brace, which groups nothing
            continue
        if brace[0] == "{":
            starts.append(None)
        elif brace[0] != "}":
            starts.append(brace.end())
        elif starts:
            start = starts.pop()
            if start is not None and (last_start is None or start > last_start):
                last_start, last_end = start, brace.start()
    if last_start is None:
        return None
    return text[last_start:last_end].strip()


# ----------------------------------------------------------------------- two answers compared

# What may stand around an answer. In each alternative one group, the answer.
_WRAPPED = re.compile(
    r"\$\$?([^$]*)\$\$?"
    r"|\\\((.*)\\\)"
    r"|\\\[(.*)\\\]"
    r"|\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}"
)
_NUMBER = re.compile(
    r"[+-]?(?:"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"  # 1,234.5 or 1234.5
    r"|\.[0-9]+"  # .5
    r"|[0-9]+/0*[1-9][0-9]*"  # 1/2, but not 1/0
    r")"
)
_AS_LATEX = {ord("−"): "-", ord("°"): r"^\circ"}


def tidy(text):
    r"""Without $ signs, \text{} and a period around it, nor blanks beside symbols; words in lower
    case. If nothing is left, the text as it was."""
    tidied = " ".join(text.split())
    unwrapped = _unwrapped(tidied)
    while unwrapped != tidied:
        tidied = unwrapped
        unwrapped = _unwrapped(tidied)
    tidied = re.sub(r" ?([^\w\s]) ?", r"\1", tidied)
    has_only_words = tidied.replace(" ", "").isalpha()
    if has_only_words:
        return tidied.casefold()
    return tidied or text


def _unwrapped(text):
    """Without a period at the end, and then without one of the wrappings around it."""
    text = text.rstrip(" .")
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped is None:
        return text
    return wrapped[wrapped.lastindex].strip()


# The responses of a group give equal answers, among them some that take math-verify seconds.
@functools.lru_cache(4096)
def same(given, true):
    """Is the given answer the true one?

    Equal texts are, once tidied. Of plain numbers (0.5, .5, 1/2; 1,234) only equal ones are. What
    has another form is not. On all else math-verify decides, if it is installed, but not on words:
    to it "act" is a*c*t, and so is "cat".
    """
    if len(given) > MAX_ANSWER:
        return False
    given, true = given.translate(_AS_LATEX), true.translate(_AS_LATEX)
    tidy_given, tidy_true = tidy(given), tidy(true)
    if tidy_given == tidy_true:
        return True
    if _NUMBER.fullmatch(tidy_given) and _NUMBER.fullmatch(tidy_true):
        return _number(tidy_given) == _number(tidy_true)
    if other_form(tidy_given, tidy_true):
        return False
    if _has_only_words(true) or importlib.util.find_spec("math_verify") is None:
        return False
    return bool(_MATH_VERIFY(given, true))


# Digits, operators and brackets alone, LaTeX's among them: nothing that could stay as it is
_ARITHMETIC = re.compile(r"(?:[-+*/^!:×·÷().,{}\[\]\d\s]|\\(?:times|cdot|div|left|right|[,;! ]))+")
_FRACTION = re.compile(r"[+-]?\\[dt]?frac(?:\{[+-]?\d+\}|\d){2}")
_DATE = re.compile(r"\d+[-/.]\d+[-/.]\d+|\d+:\d\d(?::\d\d)?")  # or a time
_NAMED = re.compile(r"\\?[A-Za-z]\w*(?:\([A-Za-z]\))?=")  # x=, f(x)=
_BRACKETS = re.compile(r"(?:\\left)?(\\\{|[(\[{]).*?(?:\\right)?(\\\}|[)\]}])", re.DOTALL)
_UNIT = re.compile(r"[-+\d.,/\s]+(?:\\(?:text|mathrm|textbf)\{([^{}]+)\}|([^\W\d_]{1,}[^\W_]*))")


def other_form(given, true):
    r"""Does an answer differ from the true one in its form, whatever their values? Both tidied.

    unworked    arithmetic with nothing but numbers left in it, where the true answer has none:
                3526*17, 10!, 2^{10}; a fraction is worked
    equation    anything before a "=", but for the name of what is asked: x=16
    date, time  2024-01-02 or 12:30, on either side
    percent     a % on one side only
    unit        5 kg and 5 cm
    brackets    (1,2), [1,2] and \{1,2\}
    """
    if not _NAMED.match(true):
        given = given[named.end() :] if (named := _NAMED.match(given)) else given
        if "=" in given and "=" not in true:
            return True
    if _DATE.fullmatch(given) or _DATE.fullmatch(true):
        return True  # equal ones have equal texts
    if is_unworked(given) and not is_unworked(true):
        return True
    if ("%" in given) != ("%" in true):
        return True
    units = [_UNIT.fullmatch(text) for text in (given, true)]
    if all(units) and len({(unit[1] or unit[2]).strip().casefold() for unit in units}) == 2:
        return True
    kinds = [_BRACKETS.fullmatch(text) for text in (given, true)]
    return all(kinds) and len({(kind[1], kind[2]) for kind in kinds}) == 2


def is_unworked(text):
    """Is it arithmetic with numbers alone, not yet worked out?"""
    is_plain = _NUMBER.fullmatch(text) or _FRACTION.fullmatch(text)
    has_operator = re.search(r"\d.*(?:[-+*/^!×·÷]|\\times|\\cdot|\\div)", text)
    return bool(not is_plain and has_operator and _ARITHMETIC.fullmatch(text))


def _number(text):
    return Fraction(text.replace(",", ""))


def _has_only_words(text):
    """Neither a digit nor a command of LaTeX, but two letters side by side."""
    return not re.search(r"[0-9\\]", text) and bool(re.search(r"[^\W\d_]{2}", text))


# ------------------------------------------------------- math-verify, in a process of its own

_MATH_VERIFY = Judge(
    "math-verify",
    r"""
from math_verify import LatexExtractionConfig, parse, verify

def read(text):  # as LaTeX only: plain expressions would go through Python's eval
    return parse(r"\boxed{" + text + "}", [LatexExtractionConfig()], parsing_timeout=None)

def judge(given, true):
    return verify(read(true), read(given), timeout_seconds=None)
""",
)
