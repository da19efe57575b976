import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfe_hpc.errors import UsageError
from cfe_hpc.ranks.nodelist import expand


@pytest.mark.parametrize(
    ("compressed", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[01-03,7],m2", ["n01", "n02", "n03", "n7", "m2"]),
        ("a,b,c", ["a", "b", "c"]),
        ("nid[000998-001001]", ["nid000998", "nid000999", "nid001000", "nid001001"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("gpu-[3]-ib,login", ["gpu-3-ib", "login"]),
        ("x[9-11]", ["x9", "x10", "x11"]),
        ("", []),
    ],
)
def test_expands_as_scontrol_does(compressed, hosts):
    assert expand(compressed) == hosts


@pytest.mark.parametrize("broken", ["n[1-3", "n1-3]", "n[]", "n[a-b]", "n[1,,2]", "n[[1]]"])
def test_broken_lists_are_named(broken):
    with pytest.raises(UsageError, match="node list") as caught:
        expand(broken)
    assert broken in str(caught.value)


@given(st.lists(st.integers(0, 9999), min_size=1, max_size=20), st.integers(1, 6))
def test_every_listed_number_becomes_one_host(numbers, width):
    assert expand(f"n[{','.join(f'{n:0{width}d}' for n in numbers)}]") == [f"n{n:0{width}d}" for n in numbers]
