"""lab/mutants.py: mutmut's records are read as they stand."""

import json

import pytest

from lab import mutants

CODE = """\
def x_whiten__mutmut_orig(x):
    return x - x.mean()

def x_whiten__mutmut_1(x):
    return x + x.mean()

def x_whiten__mutmut_2(x):
    return x - x.sum()

def x_whiten__mutmut_3(x):
    return None

def xǁCriticǁforward__mutmut_orig(self, x):
    raise ValueError("no x")

def xǁCriticǁforward__mutmut_1(self, x):
    raise ValueError("XXno xXX")

def xǁCriticǁforward__mutmut_2(self, x):
    raise ValueError(None)

def x_setting__mutmut_orig(x):
    return x

def x_setting__mutmut_1(x):
    return None
"""


def spans():
    lines = CODE.splitlines()
    starts = [number for number, line in enumerate(lines, 1) if line.startswith("def ")]
    return {lines[n - 1].split("(")[0].removeprefix("def "): [n, n + 1] for n in starts}


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        ('raise ValueError("no x")', 'raise ValueError("XXno xXX")', True),
        ('raise ValueError("no x")', 'raise ValueError("NO X")', True),
        ('raise ValueError("no x")', "raise ValueError(None)", False),
        ('if average == "response":', 'if average == "XXresponseXX":', False),
        ('if average == "response":', 'if average == "RESPONSE":', False),
    ],
)
def test_a_sentence_may_be_worded_otherwise_and_a_name_may_not(was, now, expected):
    assert mutants.same_but_for_wording(was, now) == expected


@pytest.mark.parametrize(
    ("status", "tried", "killed"),
    [(0, 1, 0), (33, 1, 0), (1, 1, 1), (-24, 1, 1), (None, 0, 0), (2, 0, 0), (-11, 0, 0)],
)
def test_what_a_status_counts_as(folder, status, tried, killed):
    """No test for it: survived. Too slow: killed. Interrupted, or crashed: not tried."""
    record = {"exit_code_by_key": {"sapo.x_whiten__mutmut_1": status}}
    (folder / "sapo.py.meta").write_text(json.dumps(record))
    found = mutants.read(folder)
    assert (found["tried"], found["killed"]) == (tried, killed)


@pytest.fixture
def folder(tmp_path):
    """What mutmut leaves of sapo.py as above, and of a baselines.py without a function."""
    status = dict.fromkeys((name for name in spans() if not name.endswith("orig")), 0)
    status |= {"x_whiten__mutmut_1": 1, "x_whiten__mutmut_3": None}
    records = {"sapo.py": (CODE, spans(), status), "baselines.py": ("", {}, {})}
    for source, (code, of_functions, of_mutants) in records.items():
        module = source.removesuffix(".py")
        by_key = {f"{module}.{name}": number for name, number in of_mutants.items()}
        (tmp_path / source).write_text(code)
        (tmp_path / f"{source}.meta").write_text(json.dumps({"exit_code_by_key": by_key}))
        (tmp_path / f"{source}.spans").write_text(json.dumps({"spans": of_functions}))
    return tmp_path


def test_what_no_test_noticed_is_listed_with_how_it_differs(folder):
    """Not what was not tried, differs in words only, or had done its work before."""
    found = mutants.read(folder)
    assert (found["tried"], found["killed"]) == (3, 1)
    assert found["functions"] == {"sapo.py: whiten": 2, "sapo.py: Critic.forward": 1}
    assert found["survivors"] == [
        {"name": "sapo.py: whiten", "was": "return x - x.mean()", "is": "return x - x.sum()"},
        {
            "name": "sapo.py: Critic.forward",
            "was": 'raise ValueError("no x")',
            "is": "raise ValueError(None)",
        },
    ]


def test_why_a_survivor_lives_is_kept_where_it_is_the_same():
    earlier = [{"name": "sapo.py: whiten", "was": "a", "is": "b", "why": "same: a is b"}]
    survivors = [
        {"name": "sapo.py: whiten", "was": "a", "is": "b"},
        {"name": "sapo.py: whiten", "was": "a", "is": "c"},
    ]
    mutants.explain(survivors, earlier)
    assert [one.get("why") for one in survivors] == ["same: a is b", None]


def test_without_records_one_line_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match="No such file.*; first: mutmut run"):
        mutants.main(["--folder", str(tmp_path)])


def test_a_reason_that_a_mutants_life_refutes_is_not_kept():
    def mutant(name, **why):
        return {"name": name, "was": "a", "is": "b", **why}

    reasons = {"x": "same: a mask", "y": "card", "z": "tested", "w": "gone"}
    survivors = [mutant(name) for name in reasons]
    mutants.explain(survivors, [mutant(name, why=why) for name, why in reasons.items()])
    assert [one.get("why") for one in survivors] == ["same: a mask", "card", None, None]
