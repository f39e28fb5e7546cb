"""Is your advantage estimator, ratio or loss right? Theorems that you can hold against it.

    python -m lab.theorems my_module:my_gae      # which hold, which do not, and what that means

or in a test suite of your own (sapo.py's functions, verl's, TRL's: lab/estimators.py):

    from lab.theorems import suite
    TestMyGae = suite(my_gae)                    # a test for each theorem

Your function's parameters say what it is. It takes them by name, as torch tensors in float64 (bool
for mask and ends), (B, T) if nothing else is said, and gives back a tensor, or a tuple that begins
with it:

    a GAE      (rewards, values, mask, gamma, lam)      -> advantages (B, T)
    a group    (rewards (B,), group)                    -> advantages (B,)
    a ratio    (logp, old_logp, mask)                   -> ratios (B, T), (B, 1) or (B,)
    a loss     (logp, old_logp, advantages, mask)       -> the loss, a number

`ends` among them marks the last token of each segment: with it the unit is the segment, without
it the token (of a ratio: whatever it likes). gamma, lam and mask may be missing; `lengths`, (B,),
is there for who takes no mask, `response_advantages`, (B,), for a loss of whole responses. Further
parameters keep their defaults. A function whose parameters have other names needs an adapter of a
few lines:

    def my_gae(rewards, values, mask, gamma, lam):
        return their_gae(values, rewards, 1 - mask, discount=gamma, lmbda=lam)[1]

Hypothesis looks for the smallest counterexample, and where it finds none a few large cases are
tried, for a function may be right on four tokens and wrong on forty. Nobody has to satisfy every
theorem: some are choices, and say so. B responses, T token positions, as in sapo.py; a group is
B / group prompts of `group` responses each, side by side.
"""

import argparse
import importlib.util
import inspect
import itertools
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from torch import Tensor

from lab import common
from lab.enumeration import world

EXAMPLES = 100  # that Hypothesis tries for each theorem
LARGE_CASES = 3  # that are tried after them

# ----------------------------------------------------------------------- what is put to the test

# Which parameters a kind of function may have, and which it must have
KINDS = {
    "gae": (
        {"rewards", "values", "mask", "lengths", "ends", "gamma", "lam"},
        {"rewards", "values"},
    ),
    "group": ({"rewards", "group"}, {"rewards", "group"}),
    "ratio": ({"logp", "old_logp", "mask", "lengths", "ends"}, {"logp", "old_logp"}),
    "loss": (
        {"logp", "old_logp", "advantages", "response_advantages", "mask", "lengths", "ends"},
        {"logp", "old_logp"},
    ),
}
FORMS = (
    "(rewards, values, mask, gamma, lam), (rewards, group), (logp, old_logp, mask) or "
    "(logp, old_logp, advantages, mask), with `ends` for segments"
)


class Refuted(AssertionError):
    """A theorem does not hold: why, and in `calls` what the function was asked."""

    calls: tuple = ()


class Refused(Exception):
    """The function raised an error: it takes no such batch. Only `any_batch` minds, unless none is
    taken at all."""


@dataclass
class Claimant:
    """A function under test, and what it was asked last.

    function: see the head of this file. ValueError where its parameters tell no kind.
    """

    function: Callable
    calls: list = field(default_factory=list)  # arguments of each call, as dictionaries

    def __post_init__(self):
        if not callable(self.function):
            raise ValueError(f"{self.function!r:.60}: expected a function")
        known = set().union(*(may for may, _ in KINDS.values()))
        every = inspect.signature(self.function).parameters.values()
        # Those of another name keep their defaults, and *args and **kwargs get nothing
        self.parameters = tuple(
            one.name
            for one in every
            if one.name in known
            or (one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD))
        )
        names = set(self.parameters)
        kinds = [kind for kind, (may, must) in KINDS.items() if must <= names <= may]
        if not kinds:
            raise ValueError(
                f"{self.name} has the parameters ({', '.join(self.parameters)}); expected {FORMS}: "
                "write an adapter, a function with those parameters that calls yours"
            )
        self.kind = kinds[0]

    @property
    def name(self):
        return getattr(self.function, "__name__", repr(self.function))

    def __call__(self, case, **changed) -> Tensor:
        """The function's answer to a case, some of its fields changed. Refused where it raises;
        Refuted where it answers in another shape."""
        fields = vars(case) | changed
        if "mask" in fields:
            fields["lengths"] = fields["mask"].sum(1)
        if "advantages" in fields:
            fields["response_advantages"] = fields["advantages"][:, 0]
        arguments = {name: fields[name] for name in self.parameters}
        self.calls.append(arguments)
        copies = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        try:
            answer = self.function(**copies)
        except Exception as error:  # whatever it raises: `any_batch` tells
            raise Refused(f"it raised {error!r}") from error
        answer = answer[0] if isinstance(answer, tuple) else answer
        try:
            answer = torch.as_tensor(answer)
        except (TypeError, ValueError, RuntimeError):
            raise Refuted(f"it gave {answer!r:.60}, expected a tensor") from None
        expected = {"gae": "rewards", "group": "rewards", "ratio": "logp"}.get(self.kind)
        expected = arguments[expected].shape if expected else ()  # a loss is a number
        if self.kind == "ratio" and answer.shape in {expected[:1], (expected[0], 1)}:
            answer = answer.view(-1, 1).expand(expected)
        if answer.shape != expected:
            raise Refuted(f"it gave {tuple(answer.shape)}, expected the shape {tuple(expected)}")
        return answer


# ---------------------------------------------------------------------------- what a theorem is


@dataclass(frozen=True)
class Theorem:
    """A property of the functions of some kinds.

    says: what holds.  otherwise: what it means for learning where it does not.
    needs: parameters without which it says nothing; "mask or lengths" is one of the two.
    """

    name: str
    kinds: tuple[str, ...]
    needs: tuple[str, ...]
    says: str
    otherwise: str
    try_case: Callable  # (claimant, draw: Small | Large) -> None, or raises Refuted
    draws: bool = True  # or else it takes an exact expectation, of small worlds alone

    def applies_to(self, claimant) -> bool:
        return claimant.kind in self.kinds and not self.missing_in(claimant)

    def missing_in(self, claimant) -> list[str]:
        """Which of its `needs` a function does not take."""
        taken = set(claimant.parameters)
        return [need for need in self.needs if not taken & set(need.split(" or "))]

    def check(self, function, examples: int = EXAMPLES) -> None:
        """Refuted where it does not hold of a function: with the smallest counterexample that
        Hypothesis finds, or where it finds none, with the place in a large case."""
        claimant = function if isinstance(function, Claimant) else Claimant(function)
        self._check_small_cases(claimant, examples)
        if self.draws:
            self._check_large_cases(claimant)

    def _check_small_cases(self, claimant, examples):
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def look(data):
            claimant.calls.clear()
            try:
                self.holds_of(claimant, data.draw)
            except Refused as refused:
                refusals.append(str(refused))
                reject()
            except Refuted as refuted:
                refuted.calls = tuple(claimant.calls)
                raise

        refusals = []
        try:
            look()
        except Unsatisfiable as error:
            raise Refuted(refusals[-1] if refusals else str(error)) from None

    def holds_of(self, claimant, hypothesis_draw):
        """Try a small case. (By the source of `look`, which calls this, Hypothesis chooses where it
        begins to look: a change there changes which counterexamples it ends with.)"""
        self.try_case(claimant, Small(hypothesis_draw))

    def _check_large_cases(self, claimant):
        for seed in range(LARGE_CASES):
            claimant.calls.clear()
            draw = Large(seed)
            try:
                self.try_case(claimant, draw)
            except Refused:
                continue
            except Refuted as refuted:
                with_the_case = Refuted(f"{draw.describe(claimant)}: {refuted}")
                with_the_case.calls = tuple(claimant.calls)
                raise with_the_case from None


THEOREMS: list[Theorem] = []


def theorem(*kinds, needs=(), draws=True):
    """Make a theorem of a function: its docstring says what holds and, after "Otherwise", what it
    means for learning where it does not."""

    def register(try_case):
        says, otherwise = " ".join(try_case.__doc__.split()).split(" Otherwise: ")
        name = try_case.__name__
        THEOREMS.append(Theorem(name, kinds, needs, says, otherwise, try_case, draws))
        return try_case

    return register


def theorems_for(claimant) -> list[Theorem]:
    """Those that say something about a function."""
    return [one for one in THEOREMS if one.applies_to(claimant)]


# --------------------------------------------------------------------------------------- cases
#
# A theorem draws the numbers of its case without a word of their size. Of Small, which Hypothesis
# fills, they are multiples of 1/2, so that a counterexample can be checked by hand. Of Large, which
# a seed fills, they are as many and as great as those of training.


@dataclass(frozen=True)
class Choice:
    """What can be drawn: by Hypothesis from a strategy, or for a large case with a generator."""

    small: st.SearchStrategy
    large: Callable  # (random.Random) -> a value


class Small:
    """Draws a small case, of which Hypothesis then looks for the smallest."""

    rows, tokens, group, prompts = 3, 4, 4, 3  # at most

    def __init__(self, hypothesis_draw):
        self.hypothesis_draw = hypothesis_draw

    def __call__(self, choice):
        return self.hypothesis_draw(choice.small)


class Large:
    """Draws a large case, always the same of the same seed."""

    rows, tokens, group, prompts = 9, 40, 8, 5
    greatest = 1000.0  # reward, value or advantage

    def __init__(self, seed):
        self.seed = seed
        self.random = random.Random(seed)

    def __call__(self, choice):
        return choice.large(self.random)

    def describe(self, claimant) -> str:
        """What the case is, without its hundreds of numbers."""
        asked_first = claimant.calls[0] if claimant.calls else {}
        if claimant.kind == "group":
            size = f"{self.prompts} groups of {self.group}"
        else:
            rows, *tokens = asked_first["logp" if "logp" in asked_first else "rewards"].shape
            size = f"{rows} rows" + "".join(f", {count} tokens" for count in tokens)
        discounts = [
            f", {name} {asked_first[name]:g}" for name in ("gamma", "lam") if name in asked_first
        ]
        return f"in a large case (seed {self.seed}: {size}{''.join(discounts)})"


def up_to(most, least=1):
    """A size: in a large case the greatest."""
    return Choice(st.integers(least, most), lambda generator: most)


def whole(least, most):
    """A whole number from `least` to `most`."""
    return Choice(st.integers(least, most), lambda generator: generator.randint(least, most))


def one_of(*options):
    """One of these, which are the same in a small and a large case."""
    return Choice(st.sampled_from(options), lambda generator: generator.choice(options))


def order_of(count):
    """The numbers below `count`, in some order."""
    return Choice(
        st.permutations(range(count)), lambda generator: generator.sample(range(count), count)
    )


def several(choice, count):
    """A list of `count` numbers, each drawn from a choice."""
    return Choice(
        st.lists(choice.small, min_size=count, max_size=count),
        lambda generator: [choice.large(generator) for _ in range(count)],
    )


# Rewards, values and advantages
amounts = Choice(
    st.integers(-6, 6).map(lambda n: n / 2),
    lambda generator: generator.uniform(-Large.greatest, Large.greatest),
)
# A token's ratio stays below e^8: nobody's guard against an overflow is meant here
logps = Choice(
    st.integers(-6, 0).map(lambda n: n / 2), lambda generator: generator.uniform(-8.0, 0.0)
)
discounts = Choice(
    st.sampled_from([1.0, 0.5, 0.0, 0.9]),
    lambda generator: round(generator.uniform(0.9, 1.0), 3),
)
# In a large case a segment has four tokens on average
flags = Choice(st.booleans(), lambda generator: generator.random() < 0.25)


def tensor(draw, rows, tokens, elements):
    """(rows, tokens) of `elements`: float64, or bool if those are."""
    # The largest is drawn and cut: so Hypothesis can take a row away and leave the others alone
    flat = draw(several(elements, draw.rows * draw.tokens))
    dtype = torch.bool if isinstance(flat[0], bool) else torch.float64
    return torch.tensor(flat, dtype=dtype).view(draw.rows, draw.tokens)[:rows, :tokens].clone()


def responses(draw, claimant, holes=False, longest=None, **numbers):
    """A case with a mask (B, T) whose rows have one token at least, a cut that closes each of them,
    a tensor (B, T) for each name of `numbers`, drawn from the elements given there, and gamma and
    lam. Without `holes` a response's tokens stand side by side, from the left; for a function that
    takes neither mask nor lengths all are of one length."""
    rows, tokens = draw(up_to(draw.rows)), draw(up_to(longest or draw.tokens))
    lengths = draw(several(whole(1, draw.tokens), draw.rows))
    if not {"mask", "lengths"} & set(claimant.parameters):
        lengths = [tokens] * draw.rows
    mask = torch.arange(tokens) < torch.tensor(lengths[:rows])[:, None]
    if holes:
        kept = tensor(draw, rows, tokens, flags)
        kept[:, 0] = True
        mask = mask & kept
    case = SimpleNamespace(mask=mask, gamma=draw(discounts), lam=draw(discounts))
    if "ends" in claimant.parameters:
        case.ends = mask & (tensor(draw, rows, tokens, flags) | is_last(mask))
    for name, elements in numbers.items():
        setattr(case, name, tensor(draw, rows, tokens, elements))
    return case


def is_last(mask):
    """The last token of each row, bool (B, T)."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def units(case, row) -> list[list[int]]:
    """The steps of a response, each a list of positions: its segments, or else its tokens."""
    steps, open_one = [], []
    for t in case.mask[row].nonzero().flatten().tolist():
        open_one.append(t)
        if not hasattr(case, "ends") or case.ends[row, t]:
            steps.append(open_one)
            open_one = []
    return steps + [open_one] * bool(open_one)


def tensors_of(case):
    """[(name, tensor), ...] of a case."""
    return [(name, x) for name, x in vars(case).items() if isinstance(x, Tensor)]


def rows_of(case, order):
    """The case with these rows, in this order."""
    tensors = {name: x[order] for name, x in tensors_of(case)}
    return SimpleNamespace(**vars(case) | tensors)


def padded(case, number):
    """The case with another column of padding, in which every number is `number`."""
    wider = {}
    for name, x in tensors_of(case):
        column = x.new_full((len(x), 1), False if x.dtype == torch.bool else number)
        wider[name] = torch.cat([x, column], 1)
    return SimpleNamespace(**vars(case) | wider)


def is_equal(got, wanted, what, mask=None, tolerance=None):
    """Refuted where two tensors differ by more than rounding, on the mask; it names the place."""
    wanted = torch.as_tensor(wanted).expand(got.shape)
    if tolerance is None:
        tolerance = 1e-7 if got.dtype == torch.float64 else 1e-4
    got, wanted = got.double(), wanted.double()
    off = ~((got - wanted).abs() <= tolerance * (1 + wanted.abs()))  # NaN differs, too
    off = off if mask is None else off & mask
    if off.any():
        place = first_place(off)
        is_now, is_due = (f"{numbers[place].item():.6g}" for numbers in (got, wanted))
        if is_now == is_due:  # they differ further behind
            is_now, is_due = (f"{numbers[place].item():.12g}" for numbers in (got, wanted))
        raise Refuted(f"{what}{in_words(place)} is {is_now}, not {is_due}")


def is_finite(got, what):
    """Refuted where a tensor holds NaN or an infinity; it names the place."""
    off = ~got.isfinite()
    if off.any():
        place = first_place(off)
        raise Refuted(f"{what}{in_words(place)} is {got[place].item()}")


def first_place(where) -> tuple[int, ...]:
    """The first place at which a bool tensor is true."""
    return tuple(where.nonzero()[0].tolist())


def in_words(place) -> str:
    """ " of row 1, token 2"; of a number nothing."""
    words = ", ".join(f"{name} {i}" for name, i in zip(("row", "token"), place, strict=False))
    return f" of {words}" if words else ""


NUMBERS = {
    "gae": {"rewards": amounts, "values": amounts},
    "ratio": {"logp": logps, "old_logp": logps},
    "loss": {"logp": logps, "old_logp": logps, "advantages": amounts},
}
ANSWER = {"gae": "the advantage", "ratio": "the ratio", "loss": "the loss"}


def case_of(draw, claimant, **options):
    """A case for a function that takes responses; advantages are the same all over a segment."""
    case = responses(draw, claimant, **options, **NUMBERS[claimant.kind])
    if "response_advantages" in claimant.parameters:
        case.advantages = case.advantages[:, :1].expand(case.mask.shape)
    elif claimant.kind == "loss":
        case.advantages = alike_in_a_unit(case, case.advantages)
    return case


def alike_in_a_unit(case, x):
    """x with the number of a segment's first token on all of its tokens."""
    x = x.clone()
    for row in range(len(x)):
        for unit in units(case, row):
            x[row, unit] = x[row, unit[0]].clone()
    return x


# -------------------------------------------------------------- theorems of responses, of any kind


@theorem("gae", "group", "ratio", "loss")
def any_batch(claimant, draw):
    """Every batch is accepted, were it a single token, and so are gamma and lambda of 0. Otherwise:
    a run ends on a batch, or with a setting, that means something."""
    case = group_case(draw) if claimant.kind == "group" else case_of(draw, claimant)
    try:
        claimant(case)
    except Refused as refused:
        raise Refuted(str(refused)) from refused


@theorem("gae", "ratio", needs=("mask or lengths",))
def padding(claimant, draw):
    """Padding changes nothing: another column of it at the right, whatever stands there. Otherwise:
    short responses are judged by how long the others are."""
    case = case_of(draw, claimant)
    longer = padded(case, draw(one_of(0.0, 1.0, -2.0)))
    got, wanted = claimant(longer)[:, :-1], claimant(case)
    is_equal(got, wanted, ANSWER[claimant.kind], case.mask)


@theorem("loss", needs=("mask or lengths",))
def padding_of_a_loss(claimant, draw):
    """Padding changes nothing: another column of it at the right, whatever stands there. Otherwise:
    the size of a step depends on the longest response of a batch. (Dr. GRPO's division by a
    maximal length is a choice, if that length is a constant.)"""
    case = case_of(draw, claimant)
    longer = padded(case, draw(one_of(0.0, -1.0)))
    is_equal(claimant(longer), claimant(case), "the loss")


@theorem("gae", "ratio", "loss", needs=("mask",))
def nan_off_the_mask(claimant, draw):
    """What stands off the mask is not read, were it NaN, or a log-probability of -inf. Otherwise:
    0 * NaN is NaN, and a banned token in the padding ends the run. It matters only where such
    numbers come in."""
    case = case_of(draw, claimant)
    case = padded(case, 0.0)
    wild = SimpleNamespace(**vars(case))
    for name in NUMBERS[claimant.kind]:
        garbage = -math.inf if name.endswith("logp") else math.nan
        setattr(wild, name, torch.where(case.mask, getattr(case, name), garbage))
    if claimant.kind == "loss":
        loss, gradient = loss_gradient(claimant, wild)
        plain_loss, plain_gradient = loss_gradient(claimant, case)
        is_equal(loss, plain_loss, "the loss")
        is_equal(gradient, plain_gradient, "its gradient")
    else:
        is_equal(claimant(wild), claimant(case), ANSWER[claimant.kind], case.mask)


@theorem("gae", "ratio", needs=("mask",))
def holes(claimant, draw):
    """Tokens that the policy did not write (a hole in the mask: a tool's output, a world's reply)
    are as if they were not there. Otherwise: in an episode of several turns credit is passed on
    wrongly across what the world said."""
    case = case_of(draw, claimant, holes=True)
    order = case.mask.long().argsort(dim=1, descending=True, stable=True)  # the written ones first
    closed = {name: x.gather(1, order) for name, x in tensors_of(case)}
    got, wanted = claimant(case), claimant(SimpleNamespace(**vars(case) | closed))
    is_equal(got.gather(1, order), wanted, ANSWER[claimant.kind], closed["mask"])


@theorem("gae", "ratio", "loss")
def order_of_the_batch(claimant, draw):
    """The order of a batch does not matter. Otherwise: a response learns from its neighbours in
    the batch."""
    case = case_of(draw, claimant)
    order = draw(order_of(len(case.mask)))
    answer = claimant(case)
    wanted, mask = (answer, None) if claimant.kind == "loss" else (answer[order], case.mask[order])
    is_equal(claimant(rows_of(case, order)), wanted, ANSWER[claimant.kind], mask)


@theorem("gae", "ratio")
def company(claimant, draw):
    """A response's numbers do not depend on which others are in its batch. Otherwise: the same
    response is praised in one batch and blamed in another. Whitening over the batch does so on
    purpose: a choice."""
    case = case_of(draw, claimant)
    together = claimant(case)
    row = draw(whole(0, len(case.mask) - 1))
    alone = claimant(rows_of(case, [row]))
    is_equal(
        together[[row]],
        alone,
        f"{ANSWER[claimant.kind]} (of row {row} in the batch)",
        case.mask[[row]],
    )


@theorem("gae", "ratio", "loss", needs=("mask",))
def an_empty_response(claimant, draw):
    """A response without a token of the policy's makes no NaN, and changes no other response's
    advantage or ratio. (A loss may count it as a response that lost nothing.) Otherwise: one empty
    answer in a batch ends the run."""
    case = case_of(draw, claimant)
    tensors = {name: torch.cat([x, torch.zeros_like(x[:1])]) for name, x in tensors_of(case)}
    case_with_it = SimpleNamespace(**vars(case) | tensors)
    if claimant.kind == "loss":
        loss, gradient = loss_gradient(claimant, case_with_it)
        is_finite(loss, "the loss")
        is_finite(gradient, "its gradient")
        return
    answer = claimant(case_with_it)
    is_equal(answer[:-1], claimant(case), ANSWER[claimant.kind], case.mask)
    if claimant.kind == "gae":
        is_finite(answer[-1:], "the advantage (of the empty response)")


# ------------------------------------------------------------------------------ theorems of GAE


def on_tokens(case, of_step):
    """(B, T): on each token of a response's m-th step the number of_step(row, its steps, m)."""
    tokens = torch.zeros_like(case.values)
    for row in range(len(case.mask)):
        steps = units(case, row)
        for m, step in enumerate(steps):
            tokens[row, step] = of_step(row, steps, m)
    return tokens


def td_error_of(case, row, steps, m):
    """delta_m = r_m + gamma V(s_{m+1}) - V(s_m): V at a step's first token, 0 after the last."""
    after = case.values[row, steps[m + 1][0]] if m + 1 < len(steps) else 0.0
    reward = case.rewards[row, steps[m]].sum()
    return reward + case.gamma * after - case.values[row, steps[m][0]]


@theorem("gae", needs=("gamma", "lam"))
def telescoping(claimant, draw):
    """At gamma = lambda = 1 the TD errors telescope: A_m = (rewards from step m on) - V(s_m), V
    read where the step begins. Otherwise: what a response is praised for is not what it earned."""
    case = case_of(draw, claimant)
    case.gamma = case.lam = 1.0

    def advantage(row, steps, m):
        to_go = sum(case.rewards[row, step].sum() for step in steps[m:])
        return to_go - case.values[row, steps[m][0]]

    is_equal(claimant(case), on_tokens(case, advantage), "the advantage", case.mask)


@theorem("gae", needs=("lam",))
def td_error(claimant, draw):
    """At lambda = 0, A_m is the TD error r_m + gamma V(s_{m+1}) - V(s_m), with V = 0 after the end.
    Otherwise: a step is not judged by what it changed; at the end, a value of something that never
    came is counted."""
    case = case_of(draw, claimant)
    case.lam, case.gamma = 0.0, case.gamma if "gamma" in claimant.parameters else 1.0
    wanted = on_tokens(case, lambda *place: td_error_of(case, *place))
    is_equal(claimant(case), wanted, "the advantage", case.mask)


@theorem("gae", needs=("gamma", "lam"))
def the_sum(claimant, draw):
    """A_m = sum over l of (gamma lambda)^l delta_{m+l}, at every gamma and lambda (Eq. 4; Eq. 6 for
    segments: gamma counts steps, not tokens). Otherwise: lambda does not trade bias against
    variance as it should."""
    case = case_of(draw, claimant)

    def advantage(row, steps, m):
        discount = case.gamma * case.lam
        later = range(len(steps) - m)
        return sum(discount**k * td_error_of(case, row, steps, m + k) for k in later)

    is_equal(claimant(case), on_tokens(case, advantage), "the advantage", case.mask)


@theorem("gae")
def linear_in_the_rewards(claimant, draw):
    """Twice the rewards and no values give twice the advantages, and the advantages of a sum of
    rewards are the sum of theirs. Otherwise: a reward that is split in two, or scaled, teaches
    something else. (Whitening takes the scale out: a choice.)"""
    case = case_of(draw, claimant)
    more = tensor(draw, *case.mask.shape, amounts)
    nothing = torch.zeros_like(case.values)
    together = claimant(case, rewards=case.rewards + 2 * more, values=nothing)
    first = claimant(case, values=nothing)
    second = claimant(case, rewards=more, values=nothing)
    is_equal(together, first + 2 * second, "the advantage of the sum", case.mask)


@theorem("gae", needs=("gamma", "lam"))
def a_constant_in_the_values(claimant, draw):
    """At gamma = lambda = 1 a constant added to every V lowers every advantage by it, no more: it
    is a baseline. Otherwise: a critic that is wrong by a constant favours early steps, or late
    ones."""
    case = case_of(draw, claimant)
    case.gamma = case.lam = 1.0
    constant = draw(one_of(1.0, -1.0, 2.5))
    lowered = claimant(case) - constant
    is_equal(claimant(case, values=case.values + constant), lowered, "the advantage", case.mask)


@theorem("gae", needs=("ends", "gamma", "lam"))
def one_token_per_segment(claimant, draw):
    """With one token per segment it is PPO's token GAE (Eq. 3 and 4). Otherwise: it is not the
    generalisation that the paper describes."""
    case = case_of(draw, claimant)
    case.ends = case.mask.clone()
    wanted = torch.zeros_like(case.values)
    advantage = next_value = torch.zeros(len(wanted), dtype=wanted.dtype)
    for t in reversed(range(wanted.shape[1])):  # with no word of segments
        delta = case.rewards[:, t] + case.gamma * next_value - case.values[:, t]
        advantage = torch.where(case.mask[:, t], delta + case.gamma * case.lam * advantage, 0.0)
        next_value = torch.where(case.mask[:, t], case.values[:, t], 0.0)
        wanted[:, t] = advantage
    is_equal(claimant(case), wanted, "the advantage", case.mask)


@theorem("gae", needs=("ends",))
def one_segment(claimant, draw):
    """With one segment per response A = R - V(s_1), at every gamma and lambda. Otherwise: a method
    of whole responses is no special case."""
    case = case_of(draw, claimant)
    case.ends = is_last(case.mask)
    total = (case.rewards * case.mask).sum(1, keepdim=True)
    is_equal(claimant(case), total - case.values[:, :1], "the advantage", case.mask)


@theorem("gae", needs=("ends",))
def shared_by_a_segment(claimant, draw):
    """All tokens of a segment have the same advantage. Otherwise: the segment is not the unit of
    credit."""
    case = case_of(draw, claimant)
    advantages = claimant(case)
    is_equal(advantages, alike_in_a_unit(case, advantages), "the advantage", case.mask)


WORLDS = range(20)  # seeds of the worlds in which an expectation is taken


@theorem("gae", needs=("gamma", "lam"), draws=False)
def unbiased(claimant, _):
    """At gamma = lambda = 1 the expected policy gradient points where the true one does, under any
    critic: exactly, summed over all responses of a small world (three tokens, at most four steps;
    one of the tokens may end a response). With `ends`, a segment ends after every second token: a
    cut that does not look ahead. Otherwise: the baseline depends on the very tokens it judges, or a
    response's length changes its weight, and the policy goes elsewhere even with endless
    samples."""
    angles = []
    for seed, stops in itertools.product(WORLDS, (False, True)):
        if stops and not {"mask", "lengths"} & set(claimant.parameters):
            continue
        w = world(seed, stops)
        case = SimpleNamespace(mask=w.mask, gamma=1.0, lam=1.0, values=w.random_critic[w.prefix])
        case.rewards = torch.where(is_last(w.mask), w.reward[:, None], 0.0)
        case.ends = w.mask & torch.tensor([False, True] * 2) | is_last(w.mask)
        advantages = torch.where(w.mask, claimant(case).double(), 0.0)
        logits = w.logits.clone().requires_grad_()
        per_response = torch.where(w.mask, advantages * w.token_logp(logits), 0.0).sum(1)
        (expected,) = torch.autograd.grad((w.probability(w.logits) * per_response).sum(), logits)
        angles.append(degrees_between(expected, w.true_gradient()))
    claimant.calls.clear()  # 81 responses are nothing to read
    is_one_direction(angles)


def degrees_between(one, other):
    """The angle between two gradients."""
    cosine = ((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-30)).item()
    if not math.isfinite(cosine):
        raise Refuted(f"the expected gradient has the length {one.norm().item()}")
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def is_one_direction(angles):
    """Refuted unless all angles to the true gradient are 0."""
    if max(angles) > 0.01:
        mean = sum(angles) / len(angles)
        raise Refuted(
            f"the expected gradient is {mean:.1f} degrees off the true one, on average of "
            f"{len(angles)} worlds, {max(angles):.1f} at most"
        )


# --------------------------------------------------------------------------- theorems of groups


def group_case(draw):
    """Rewards of some prompts with a group of two responses or more each."""
    group, prompts = draw(up_to(draw.group, least=2)), draw(up_to(draw.prompts))
    flat = draw(several(amounts, group * prompts))
    return SimpleNamespace(rewards=torch.tensor(flat, dtype=torch.float64), group=group)


@theorem("group")
def sum_to_zero(claimant, draw):
    """The advantages of a group add up to zero. Otherwise: the baseline is not the group's mean.
    That is no bias, but noise: whatever is added to all rewards pushes all responses."""
    case = group_case(draw)
    sums = claimant(case).view(-1, case.group).sum(1)
    is_equal(sums, torch.zeros_like(sums), "the sum of the group")


@theorem("group")
def equal_rewards(claimant, draw):
    """A group of equal rewards teaches nothing: zeros, never NaN. Otherwise: a prompt that is
    always solved, or never, ends the run or pushes all of its responses."""
    case = group_case(draw)
    case.rewards[:] = draw(one_of(0.0, 1.0, -1.5, 0.1, 1000.1))
    is_equal(claimant(case), torch.zeros_like(case.rewards), "the advantage")


@theorem("group")
def origin_of_the_rewards(claimant, draw):
    """A constant added to all rewards changes nothing. Otherwise: rewards of 0 and 1 teach
    something else than -1 and 0."""
    case = group_case(draw)
    shifted = claimant(case, rewards=case.rewards + draw(one_of(1.0, -2.0)))
    is_equal(shifted, claimant(case), "the advantage")


@theorem("group")
def better_is_better(claimant, draw):
    """In a group, who earned more has the greater advantage, and who earned the same the same.
    Otherwise: the worse response is preferred."""
    case = group_case(draw)
    rewards, advantages = case.rewards.tolist(), claimant(case).tolist()
    for first, second in itertools.permutations(range(len(rewards)), 2):
        if first // case.group != second // case.group:
            continue
        gained = advantages[first] - advantages[second]
        is_better = rewards[first] > rewards[second]
        if is_better != (gained > 1e-6):
            raise Refuted(
                f"responses {first} and {second} earned {rewards[first]:g} and "
                f"{rewards[second]:g}, and get {advantages[first]:.6g} and "
                f"{advantages[second]:.6g}"
            )


@theorem("group")
def other_groups(claimant, draw):
    """A group's advantages do not depend on the other prompts of the batch. Otherwise: what a
    response is worth depends on chance company. Scaling by the whole batch does so on purpose: a
    choice."""
    case = group_case(draw)
    together = claimant(case).view(-1, case.group)
    for group, rewards in zip(together, case.rewards.view(-1, case.group), strict=True):
        is_equal(group, claimant(case, rewards=rewards), "the advantage")


@theorem("group")
def nan_stays_in_its_group(claimant, draw):
    """A reward that is NaN is refused, or harms its own group alone. Otherwise: one failed grader
    spoils the whole batch."""
    case = group_case(draw)
    place = draw(whole(0, len(case.rewards) - 1))
    broken = case.rewards.clone()
    broken[place] = math.nan
    try:
        got = claimant(case, rewards=broken).view(-1, case.group)
    except Refused:
        return
    for number, advantages in enumerate(got):
        if number != place // case.group and advantages.isnan().any():
            count = advantages.isnan().sum().item()
            raise Refuted(
                f"response {place} earned NaN, and {count} advantages of group {number} are NaN"
            )


@theorem("group", draws=False)
def unbiased_in_a_group(claimant, _):
    """The expected policy gradient points where the true one does: exactly, summed over all 27
    groups of three from three responses that earn differently. Otherwise: the policy goes elsewhere
    even with endless samples. Division by a group's own spread (GRPO) does so, as a choice: groups
    that nearly agree count more."""
    groups = torch.tensor(list(itertools.product(range(3), repeat=3)))  # (27, 3)
    angles = []
    for seed in WORLDS:
        generator = torch.Generator().manual_seed(seed)
        logits, reward = torch.randn(2, 3, dtype=torch.float64, generator=generator)
        logits.requires_grad_()
        case = SimpleNamespace(rewards=reward[groups].flatten(), group=3)
        advantages = claimant(case).double().view(groups.shape)
        logp = logits.log_softmax(0)
        probability = logp.detach()[groups].sum(1).exp()  # (27,)
        surrogate = (probability * (advantages * logp[groups]).sum(1)).sum()
        (expected,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
        (true,) = torch.autograd.grad((logp.exp() * reward).sum(), logits)
        angles.append(degrees_between(expected, true))
    claimant.calls.clear()
    is_one_direction(angles)


# --------------------------------------------------------------------------- theorems of ratios


def ratio_units(claimant, case, row):
    """The segments of a response; without `ends`, the response."""
    if "ends" in claimant.parameters:
        return units(case, row)
    return [case.mask[row].nonzero().flatten().tolist()]


@theorem("ratio")
def equation_8(claimant, draw):
    """A segment's ratio is the geometric mean of its token ratios, and stands on all of its tokens
    (Eq. 8). Without `ends` it is that of the response (GSPO), or else each token's own (Eq. 2).
    Otherwise: it is another ratio. The product is the true weight of a segment: a choice."""
    case = case_of(draw, claimant)
    log_ratio = case.logp - case.old_logp
    means = torch.zeros_like(log_ratio)
    for row in range(len(means)):
        for unit in ratio_units(claimant, case, row):
            means[row, unit] = log_ratio[row, unit].mean()
    got = claimant(case)
    if "ends" not in claimant.parameters:
        own = torch.where(case.mask, got - log_ratio.exp(), 0.0)
        if own.abs().max() < 1e-4:
            return
    is_equal(got, means.exp(), "the ratio", case.mask)


@theorem("ratio")
def one_on_policy(claimant, draw):
    """Where pi = pi_old every ratio is exactly 1. Otherwise: the first step is clipped or scaled
    before anything was learned."""
    case = case_of(draw, claimant)
    got = claimant(case, logp=case.old_logp)
    is_equal(got, torch.ones_like(got), "the ratio", case.mask, tolerance=0.0)


@theorem("ratio")
def geometric(claimant, draw):
    """Where all tokens of a segment (without `ends`: of a response) became likelier by one factor,
    the ratio is that factor, however many they are (Eq. 8). Otherwise: a long segment's ratio
    leaves the clip range sooner than a short one's. The product of the token ratios does so: it is
    the true weight of a segment, and a choice."""
    case = case_of(draw, claimant)
    shift = tensor(draw, *case.mask.shape, one_of(0.5, -0.5, 0.0))
    for row in range(len(shift)):
        for unit in ratio_units(claimant, case, row):
            shift[row, unit] = shift[row, unit[0]].clone()
    got = claimant(case, logp=case.old_logp + shift)
    is_equal(got, shift.exp(), "the ratio", case.mask)


@theorem("ratio", needs=("ends",))
def token_ratio(claimant, draw):
    """With one token per segment it is PPO's token ratio, pi / pi_old (Eq. 2). Otherwise: it is not
    the generalisation that the paper describes."""
    case = case_of(draw, claimant)
    case.ends = case.mask.clone()
    is_equal(claimant(case), (case.logp - case.old_logp).exp(), "the ratio", case.mask)


@theorem("ratio")
def between_its_tokens(claimant, draw):
    """The ratio lies between the least and the greatest token ratio of its segment (without `ends`:
    of its response). Otherwise: it can leave the clip range though no token did. The product does:
    a choice."""
    case = case_of(draw, claimant)
    got = claimant(case).double()
    tokens = (case.logp - case.old_logp).exp()
    for row in range(len(got)):
        for unit in ratio_units(claimant, case, row):
            least, greatest = tokens[row, unit].min(), tokens[row, unit].max()
            for t in unit:
                if not least * (1 - 1e-6) <= got[row, t] <= greatest * (1 + 1e-6):
                    raise Refuted(
                        f"the ratio of row {row}, token {t} is {got[row, t]:.6g}; those of its "
                        f"tokens lie from {least:.6g} to {greatest:.6g}"
                    )


@theorem("ratio")
def reciprocal(claimant, draw):
    """Swapping pi and pi_old inverts every ratio. Otherwise: moving away and coming back does not
    end where it began."""
    case = case_of(draw, claimant)
    there, back = claimant(case), claimant(case, logp=case.old_logp, old_logp=case.logp)
    is_equal(there * back, torch.ones_like(there), "ratio times reverse ratio", case.mask)


@theorem("ratio", needs=("ends",))
def bound_of_the_root(claimant, draw):
    """|product - ratio| <= e^(L |mu|) (L - 1) |mu| for a segment of L tokens and mean log-ratio mu
    (Eq. 26). Otherwise: the distance from the true weight is more than the paper allows."""
    case = case_of(draw, claimant)
    got, log_ratio = claimant(case).double(), case.logp - case.old_logp
    for row in range(len(got)):
        for unit in units(case, row):
            size = log_ratio[row, unit].mean().abs().item()
            bound = math.exp(len(unit) * size) * (len(unit) - 1) * size
            distance = (log_ratio[row, unit].sum().exp() - got[row, unit[0]]).abs().item()
            if not distance <= bound * (1 + 1e-6) + 1e-6:  # NaN, too, is refuted
                raise Refuted(f"the distance is {distance:.6g}, the bound {bound:.6g} (row {row})")


# --------------------------------------------------------------------------- theorems of losses


def loss_gradient(claimant, case, **changed):
    """The loss and its gradient by logp, (B, T)."""
    logp = changed.pop("logp", case.logp).clone().requires_grad_()
    loss = claimant(case, logp=logp, **changed)
    try:
        (gradient,) = torch.autograd.grad(loss, logp)
    except RuntimeError as error:
        raise Refuted(f"its loss has no gradient by logp: {error}") from error
    return loss.detach(), gradient


def token_weights(claimant, case):
    """How much each token counts: -dL/dlogp at ratio 1 where every advantage is 1. (B, T)."""
    ones = torch.ones_like(case.advantages)
    _, gradient = loss_gradient(claimant, case, logp=case.old_logp, advantages=ones)
    return -gradient


@theorem("loss")
def equation_13(claimant, draw):
    """At ratio 1 the gradient is the policy gradient: each token of a response is pushed by its
    advantage, and all with the same weight c > 0: dL/dlogp_t = -c A_t (Eq. 13: a segment's length
    cancels). Otherwise: tokens of long segments are pushed harder, or not by their advantage."""
    case = case_of(draw, claimant)
    weights = token_weights(claimant, case)
    _, gradient = loss_gradient(claimant, case, logp=case.old_logp)
    first = weights[:, :1].expand_as(weights)
    wrong = case.mask & ~(weights > 0)
    if wrong.any():
        row, t = first_place(wrong)
        raise Refuted(
            f"the weight of row {row}, token {t} is {weights[row, t].item():.6g}, not above 0"
        )
    is_equal(weights, first, "the weight", case.mask)
    is_equal(-gradient, first * case.advantages, "the push", case.mask)


@theorem("loss")
def every_token_alike(claimant, draw):
    """A token of a short response weighs as much as one of a long one. Otherwise: a long wrong
    answer is punished less per token than a short one, and a short right one praised more. The mean
    over each response first (GRPO, Eq. 9) does so: a choice."""
    case = case_of(draw, claimant)
    weights = token_weights(claimant, case)
    is_equal(weights, weights[:1, :1].expand_as(weights), "the weight", case.mask)


@theorem("loss")
def pessimistic(claimant, draw):
    """Clipping never promises more: the loss is at least that of the plain ratio,
    -sum of c ratio A. (Responses of one token here: on them all kinds of ratio agree.) Otherwise:
    the policy is paid for going too far. A bound on the loss of bad tokens (dual clip) does so for
    ratios above it: a choice."""
    case = case_of(draw, claimant, longest=1)
    shift = tensor(draw, *case.mask.shape, one_of(0.0, 0.5, -0.5, 1.5, -1.5))
    weights = token_weights(claimant, case)
    loss, _ = loss_gradient(claimant, case, logp=case.old_logp + shift)
    plain = -(weights * shift.exp() * case.advantages).sum()
    if not loss >= plain - 1e-6:  # NaN, too, is refuted
        raise Refuted(f"the loss is {loss:.6g}, the unclipped one {plain:.6g}")


@theorem("loss")
def a_way_back(claimant, draw):
    """A response that moved the wrong way (bad, and yet its tokens e^1.5 times as likely; good, and
    yet e^-1.5) is still pulled back: its gradient is not 0. Otherwise: a mistake of the last step
    stays. A bound on the loss of bad tokens (dual clip at 3) lets go of those far off: a choice."""
    case = case_of(draw, claimant)
    good = tensor(draw, len(case.mask), 1, flags)
    sign = good.double() * 2 - 1
    case.advantages = torch.ones_like(case.advantages) * sign
    _, gradient = loss_gradient(claimant, case, logp=case.old_logp - 1.5 * sign)
    stuck = case.mask & ~(-gradient * sign > 1e-9)
    if stuck.any():
        row, t = first_place(stuck)
        raise Refuted(f"the push of row {row}, token {t} is {-gradient[row, t].item():.6g}")


@theorem("loss")
def the_clip_works(claimant, draw):
    """A response that moved far the right way (good, and e^3 times as likely; bad, and e^-3) is
    pushed no further. Otherwise: nothing keeps the policy near the one that wrote the responses."""
    case = case_of(draw, claimant)
    good = tensor(draw, len(case.mask), 1, flags)
    sign = good.double() * 2 - 1
    case.advantages = torch.ones_like(case.advantages) * sign
    _, gradient = loss_gradient(claimant, case, logp=case.old_logp + 3 * sign)
    is_equal(gradient, torch.zeros_like(gradient), "the push", case.mask)


# ------------------------------------------------------------------------------------- reports


@dataclass
class Verdict:
    """What became of a theorem: "holds", "fails" or "does not apply"."""

    theorem: Theorem
    outcome: str
    reason: str = ""
    calls: tuple = ()


def verdicts(function, examples: int = EXAMPLES) -> list[Verdict]:
    """Every theorem of the function's kind, held against it. ValueError for a function whose
    parameters tell no kind."""
    claimant = Claimant(function)
    found = []
    for one in THEOREMS:
        if claimant.kind not in one.kinds:
            continue
        if not one.applies_to(claimant):
            missing = ", ".join(one.missing_in(claimant))
            found.append(Verdict(one, "does not apply", f"it takes no {missing}"))
            continue
        try:
            one.check(claimant, examples)
        except Refuted as refuted:
            found.append(Verdict(one, "fails", str(refuted), refuted.calls))
        else:
            found.append(Verdict(one, "holds"))
    return found


READABLE = 24  # numbers: those of every small case


def written(value) -> str:
    """A number or a tensor, short: of a large tensor the shape."""
    if not isinstance(value, Tensor):
        return f"{value:g}"
    if value.numel() > READABLE:
        return f"[{' x '.join(map(str, value.shape))} numbers]"
    if value.dtype == torch.bool:
        value = value.long()
    return str(value.tolist())


def equal(one, other) -> bool:
    """Are two arguments the same? NaN is equal to NaN here."""
    if not isinstance(one, Tensor):
        return one == other
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def asked(calls) -> list[str]:
    """What the function was asked, a line per call; of the later calls only what changed."""
    lines, before = [], {}
    for call in calls:
        fresh = {
            name: written(value)
            for name, value in call.items()
            if name not in before or not equal(value, before[name])
        }
        lines.append(
            ", ".join(f"{name} {text}" for name, text in fresh.items()) or "the same again"
        )
        before |= call
    return lines


def report(function, found) -> str:
    """The verdicts in words."""
    claimant = Claimant(function)
    lines = [f"{claimant.name}({', '.join(claimant.parameters)}), a {claimant.kind}", ""]
    for verdict in found:
        heading = f"{verdict.outcome:15}{verdict.theorem.name}: {verdict.theorem.says}"
        lines.append(heading)
        if verdict.outcome == "fails":
            lines.append(f"{'':17}found: {verdict.reason}")
            labels = itertools.chain(["asked:"], itertools.repeat("then: "))
            for label, line in zip(labels, asked(verdict.calls), strict=False):
                lines.append(f"{'':17}{label} {line}")
            lines.append(f"{'':17}so:    {verdict.theorem.otherwise}")
        elif verdict.reason:
            lines.append(f"{'':17}{verdict.reason}")
    failed = sum(verdict.outcome == "fails" for verdict in found)
    held = sum(verdict.outcome == "holds" for verdict in found)
    return "\n".join([*lines, "", f"{held} hold, {failed} fail"])


def suite(function, except_for=(), examples: int = EXAMPLES) -> type:
    """A class of tests for pytest, one for each theorem that applies to a function.

    except_for: names of theorems that are not meant to hold. ValueError for a name that none has.
    """
    unknown = set(except_for) - {one.name for one in THEOREMS}
    if unknown:
        raise ValueError(f"except_for: no theorem is called {', '.join(sorted(unknown))}")
    found = [one for one in theorems_for(Claimant(function)) if one.name not in except_for]

    class TheoremsHold:
        @pytest.mark.parametrize("one", found, ids=lambda one: one.name)
        def test_theorem(self, one):
            one.check(function, examples)

    return TheoremsHold


WHERE = "module:function, of a module in this folder or on PYTHONPATH, or path/to/file.py:function"


def module_of(file):
    """The module in a Python file. It may import what stands beside it, if that has no name of
    ours. ImportError where there is no such file."""
    if not file.is_file():
        raise ImportError("there is no such file")
    sys.path.insert(0, str(file.resolve().parent))
    # By its path, for its name may be another module's: a user's sapo.py is not ours
    spec = importlib.util.spec_from_file_location(str(file), file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(file)] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def imported(name):
    """The function that "module:function" or "file.py:function" names. ValueError where there is
    none."""
    module, _, attribute = name.rpartition(":")
    if not module:
        raise ValueError(f"{name!r}: expected {WHERE}, such as sapo:segment_gae")
    try:  # an error of the module's own keeps its traceback
        if module.endswith(".py"):
            found = module_of(Path(module))
        elif module.startswith("."):
            raise ImportError("a relative name")
        else:
            found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name}: {error}; expected {WHERE}") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ValueError(f"{name}: {error}; expected {WHERE}") from error
    if not callable(found):
        raise ValueError(f"{name} is {found!r:.60}, expected a function")
    return found


def parse(argv=None) -> argparse.Namespace:
    """The command line -> its arguments."""
    parser = common.command_line("theorems", __doc__)
    parser.add_argument(
        "function", help="module:function or file.py:function; see docs/theorems.md"
    )
    parser.add_argument(
        "--examples", type=common.whole(1), default=EXAMPLES, help="tried for each theorem"
    )
    return parser.parse_args(argv)


def main(argv=None):
    """The command line. Exit status 1 where a theorem fails."""
    arguments = parse(argv)
    try:
        function = imported(arguments.function)
        found = verdicts(function, arguments.examples)
    except ValueError as error:
        raise SystemExit(f"python -m lab.theorems: {error}") from error
    print(report(function, found))
    sys.exit(any(verdict.outcome == "fails" for verdict in found))


if __name__ == "__main__":
    main()
