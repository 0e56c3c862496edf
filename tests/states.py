"""Whether two evaluations came to the same: counts are exact, and sums as good as float64 can be."""

import math


def assert_same_figures(found, wanted, rel=1e-12):
    """Compare what `to_dict` gives, at any depth; figures near 0 may differ by what they are sums of."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        pairs = [(found[name], wanted[name]) for name in wanted]
    elif isinstance(wanted, list):
        pairs = list(zip(found, wanted, strict=True))
    elif isinstance(wanted, float):
        is_same = math.isclose(found, wanted, rel_tol=rel, abs_tol=rel / 100)
        assert is_same or (math.isnan(found) and math.isnan(wanted)), f"{found} is not {wanted}"
        return
    else:
        assert found == wanted
        return
    for pair in pairs:
        assert_same_figures(*pair, rel)


def assert_same_states(found, wanted, rel=1e-12):
    """Compare all figures of two states, and of their groups."""
    assert (found.ignored, found.masked, found.shifted) == (wanted.ignored, wanted.masked, wanted.shifted)
    assert found.correct == wanted.correct
    assert_same_figures(found.compute().to_dict(), wanted.compute().to_dict(), rel)
    for sums in ("total", "deviations"):
        assert_same_figures(getattr(found.finite, sums).value, getattr(wanted.finite, sums).value, rel)
    assert found.classes.ranks.tolist() == wanted.classes.ranks.tolist()
    assert found.histogram == wanted.histogram
    assert found.labels.confusions.tolist() == wanted.labels.confusions.tolist()
    assert found.groups.keys() == wanted.groups.keys()
    for key, group in found.groups.items():
        assert_same_states(group, wanted.groups[key], rel)
