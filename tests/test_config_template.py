"""`{params.NAME}` in commands."""

from __future__ import annotations

import pytest

from cfe_hpc.config.template import fill_in, missing_parameters

PARAMS = {
    "lr": 0.001,
    "tag": "a b; $(rm) 'x'\n\"é\"",
    "on": True,
    "sizes": [1, 2],
    "model": {"dim": 8},
    "loop": "{params.lr}",
}


@pytest.mark.parametrize(
    ("word", "filled"),
    [
        ("{params.lr}", "0.001"),
        ("--lr={params.lr},{params.on}", "--lr=0.001,true"),
        ("{params.tag}", PARAMS["tag"]),
        ("{params.sizes}", "[1, 2]"),
        ("{params.model}", '{"dim": 8}'),
        ("{params.model.dim}", "8"),
        ("{params.loop}", "{params.lr}"),
        ("{x} {params} {params.} ${HOME} {{}} {0}", "{x} {params} {params.} ${HOME} {{}} {0}"),
    ],
)
def test_fill_in(word: str, filled: str) -> None:
    assert fill_in(word, PARAMS) == filled
    assert missing_parameters(word, PARAMS) == []


def test_missing_parameters_are_named() -> None:
    assert missing_parameters("{params.a} {params.model.width} {params.lr.x} {params.lr}", PARAMS) == [
        "a",
        "model.width",
        "lr.x",
    ]
    with pytest.raises(KeyError):
        fill_in("{params.a}", PARAMS)
