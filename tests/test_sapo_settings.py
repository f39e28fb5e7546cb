"""sapo.py, settings: the paper's column, the released code's, and defaults that agree."""

import inspect
import math
import typing
from dataclasses import dataclass

import pytest
import torch

import baselines
import sapo
from baselines import Method
from sapo import SAPOConfig


def test_defaults_are_the_papers_mathematics():
    """Only the numbers differ that teach a tiny model fast."""
    paper, default = vars(SAPOConfig.paper()), vars(SAPOConfig())
    different = {name for name in paper if paper[name] != default[name]}
    rates = {"actor_lr", "critic_lr", "kl_coef"}
    assert different == rates | {"lam", "epochs", "minibatch", "target_kl"}


def test_paper_is_table_7_and_the_equations():
    paper = vars(SAPOConfig.paper())
    expected = {
        "gamma": 1.0,
        "lam": 0.99,
        "critic_lam": None,
        "top_k": 0.3,
        "value_at": "start",
        "ratio": "segment",
        "average": "response",
        "dual_clip": None,
        "whiten_advantages": False,
        "advantage_clamp": math.inf,
        "value_clip": None,
        "value_coef": 1.0,
        "kl_coef": 0.001,
        "epochs": 1,
        "minibatch": 128,
        "target_kl": math.inf,
        "actor_lr": 1e-6,
        "critic_lr": 2e-6,
    }
    assert {name: paper[name] for name in expected} == expected
    assert paper["clip_low"] == paper["clip_high"] == 0.2  # 1 +- eps


def test_released_departs_from_the_paper_as_listed():
    paper, released = vars(SAPOConfig.paper()), vars(SAPOConfig.released())
    assert {name: value for name, value in released.items() if value != paper[name]} == {
        "value_at": "end",
        "average": "token",
        "clip_high": 0.28,
        "dual_clip": 3.0,
        "whiten_advantages": True,
        "advantage_clamp": 5.0,
        "value_clip": 0.5,
        "value_coef": 0.5,
    }
    assert released["clip_low"] == 0.2


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("value_at", "middle", "'middle', expected one of start, end"),
        ("average", None, "None, expected one of response, token"),
        ("ratio", "sequence", "'sequence', expected one of segment, token, response, product"),
        ("minibatch", 2.5, "2.5, expected a whole number"),
        ("epochs", True, "True, expected a whole number"),
        ("lam", None, "None, expected a number"),
        ("lam", "0.9", "'0.9', expected a number"),
        ("critic_lam", "0.9", "'0.9', expected a number or None"),
        ("whiten_advantages", "no", "'no', expected True or False"),
        ("lam", 1.5, r"1.5, expected a number in \[0, 1\]"),
        ("gamma", math.nan, r"nan, expected a number in \[0, 1\]"),
        ("advantage_clamp", 0.0, r"0.0, expected a number in \(0, inf\]"),  # an open end
        ("value_coef", math.inf, r"inf, expected a number in \[0, inf\)"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(name, wrong, expected):
    with pytest.raises(ValueError, match=f"^{name}: {expected}$"):
        SAPOConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("clip_high", 1e308),
        ("advantage_clamp", 3.5e38),
        ("kl_coef", 1e308),
        ("value_coef", 1e300),
        ("target_kl", 1e-320),
        ("kl_coef", 1e-60),
        ("epochs", 2**31),
        ("minibatch", 10**400),
    ],
)
def test_a_number_that_32_bits_do_not_hold_is_refused(name, wrong):
    """In float32 it would be infinite, or 0: another setting than the one that was given."""
    with pytest.raises(
        ValueError, match=f"^{name}: .*, expected a number in .* that 32 bits hold$"
    ):
        SAPOConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "right"),
    [("clip_high", 3e38), ("kl_coef", 1e-38), ("advantage_clamp", math.inf), ("epochs", 2**31 - 1)],
)
def test_a_number_that_32_bits_just_hold_is_taken(name, right):
    assert getattr(SAPOConfig(**{name: right}), name) == right


def test_what_32_bits_hold_does_not_depend_on_torchs_default():
    """Who has made that float64 gets the same answer."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match="^kl_coef: 1e-60, .* that 32 bits hold$"):
            SAPOConfig(kl_coef=1e-60)
    finally:
        torch.set_default_dtype(default)


@dataclass
class Others:
    """Settings of kinds that the algorithm's own have not."""

    numbers: list[int] = sapo.setting([1, 2], "counts", "[1, inf)")
    words: list[str] = sapo.setting([], "names")
    word: str = sapo.setting("a", "a name")
    share: float = sapo.setting(0.5, "a meaning; in two parts", "[0, 1]")
    bare: int = 1


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("numbers", [4, "4"], r"\[4, '4'\], expected a list, each a whole number"),
        ("numbers", (4, 4), r"\(4, 4\), expected a list, each a whole number"),
        ("numbers", [4, 0], r"\[4, 0\], expected a number in \[1, inf\)"),
        ("words", [1], r"\[1\], expected a list, each a word"),
        ("word", 1, "1, expected a word"),
        ("share", 2.0, r"2.0, expected a number in \[0, 1\]"),
        ("bare", 0.5, "0.5, expected a whole number"),
    ],
)
def test_lists_and_words_are_checked_and_a_field_without_a_meaning(name, wrong, expected):
    sapo.check_settings(Others())
    with pytest.raises(ValueError, match=f"^{name}: {expected}$"):
        sapo.check_settings(Others(**{name: wrong}))


def test_the_closed_end_of_an_interval_is_allowed():
    settings = {"gamma": 0.0, "lam": 1.0, "top_k": 1.0, "target_kl": math.inf, "kl_coef": 0.0}
    assert vars(SAPOConfig(**settings)).items() >= settings.items()


@pytest.mark.parametrize("name", vars(SAPOConfig()))
def test_every_setting_says_what_it_means(name):
    field = SAPOConfig.__dataclass_fields__[name]
    assert len(field.metadata["help"]) > 10


def shared_defaults(function, settings):
    """The defaults of a function's parameters that are settings too."""
    defaults = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty and name in settings:
            defaults[name] = parameter.default
    return defaults


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("entropy_ends", {"top_k"}),
        ("entropy_quantile", {"top_k"}),
        ("boundaries", {"value_at"}),
        ("segment_gae", {"gamma", "lam", "value_at"}),
        ("policy_loss", {"clip_low", "clip_high", "dual_clip", "average"}),
        ("value_loss", {"value_at", "value_clip", "average"}),
    ],
)
def test_a_functions_defaults_are_those_of_the_settings(function, names):
    """A call without options computes what the paper does."""
    settings = vars(SAPOConfig.paper())
    defaults = shared_defaults(getattr(sapo, function), settings)
    assert defaults == {name: settings[name] for name in names}


def test_without_flags_a_run_differs_in_lambda_alone():
    """Of all that the functions have as defaults, too."""
    paper, default = vars(SAPOConfig.paper()), vars(SAPOConfig())
    for function in vars(sapo).values():
        if inspect.isfunction(function):
            for name in shared_defaults(function, paper).keys() - {"lam"}:
                assert paper[name] == default[name], (function, name)


def test_the_kind_of_ratio_is_the_settings():
    kind = inspect.signature(sapo.importance_ratio).parameters["kind"].default
    assert kind == SAPOConfig().ratio == SAPOConfig.paper().ratio
    assert typing.get_args(typing.get_type_hints(SAPOConfig)["ratio"]) == sapo.RATIOS


def test_the_defaults_of_baselines_cut_are_those_of_the_settings():
    settings = vars(SAPOConfig()) | vars(Method())
    defaults = shared_defaults(baselines.cut, settings)
    assert defaults == {name: settings[name] for name in ("top_k", "segment_tokens")}
