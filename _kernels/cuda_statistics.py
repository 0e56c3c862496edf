"""What one thread keeps of the classes it has seen, and how a team's threads bring it together.

A state is (m, r, n, s, c, ...): m is the largest logit and n how often it was met; s is the sum of exp(x - r)
over the others, c what its last addition lost. r follows m only when m has grown by more than one nat: so
a slowly rising row rescales its sum seldom, and the errors of that do not add up. All equals of the largest
stay out of the sum, and others = s*exp(r - m) + (n - 1) keeps its relative precision however far the largest
is ahead. Coefficients by class add the sums of gamma below m and at m, and of gamma*(m - x); the entropy adds
the sum of exp(x - r)*(r - x). All sums are compensated.

The threads of a team find their largest logit first, then express their sums in it and add: one exponential a
thread, where merging pairs would take one a step.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from logitloss._kernels.cuda_memory import device
from logitloss._kernels.cuda_steps import larger, machine, plus, reduction, tree, tree2


@functools.cache
def statistics(real: type, kind: str) -> SimpleNamespace:
    """Return start, push and finish of states; `kind` is "plain", "coefficients" or "entropy"."""
    steps = machine(real)
    zero, one = real(0), real(1)
    infinity, most = real(np.inf), real(np.finfo(real).max)
    exp, gap_of, reference, where = steps.exp, steps.gap_of, steps.reference, steps.where
    absolute = steps.absolute

    @device
    def add(total, lost, value):
        """Add to a compensated sum; an infinite one loses nothing."""
        value = value - lost
        after = total + value
        return after, where(absolute(after) < infinity, (after - total) - value, zero)

    @device
    def itself(x, with_):
        return x

    @device
    def is_top(x, m):
        return where(x == m, one, zero)

    @device
    def exponential(x, with_):
        return where(x == with_[0], zero, exp(x - with_[1]))

    @device
    def weighted_distance(x, with_):
        e = where(x == with_[0], zero, exp(x - with_[1]))
        return where(e == zero, zero, e * (with_[1] - x))

    @device
    def gap(x, gamma, m):
        return gap_of(gamma, m, x)

    @device
    def at_top(x, gamma, m):
        return where(x == m, gamma, zero)

    @device
    def below_top(x, gamma, m):
        return where(x == m, zero, gamma)

    @device
    def rise(m, r, n, s, c, largest):
        """Let a new largest logit take the place of m."""
        if n > zero:
            s, c = add(s, c, n * exp(m - r))
        if largest > r + one:
            new = largest if largest < most else most
            factor = exp(r - new)
            s, c, r = s * factor, c * factor, new
        return r, s, c

    @functools.cache
    def pushes(width: int) -> Any:
        """Return a function (state, logits, gammas) -> state that takes in so many classes at once."""
        largest_of, equals = tree(itself, larger, width), tree(is_top, plus, width)
        sum_exponentials = tree(exponential, plus, width)

        @device
        def push_plain(state, x, gamma):
            m, r, n, s, c = state
            largest = largest_of(x, m)
            if largest > m:
                r, s, c = rise(m, r, n, s, c, largest)
                m, n = largest, zero
            s, c = add(s, c, sum_exponentials(x, (m, r)))
            return m, r, n + equals(x, m), s, c

        if kind == "plain":
            return push_plain

        if kind == "entropy":
            sum_distances = tree(weighted_distance, plus, width)

            @device
            def push_entropy(state, x, gamma):
                m, r, n, s, c, h, hc = state
                largest = largest_of(x, m)
                if largest > m:
                    before, old = s, r
                    e = n * exp(m - r)
                    if e > zero:
                        h, hc = add(h, hc, e * (r - m))
                        before = before + e
                    r, s, c = rise(m, r, n, s, c, largest)
                    if r != old:
                        factor = exp(old - r)
                        h, hc = h * factor, hc * factor
                        moved = factor * before
                        if moved > zero:
                            h, hc = add(h, hc, moved * (r - old))
                    m, n = largest, zero
                s, c = add(s, c, sum_exponentials(x, (m, r)))
                h, hc = add(h, hc, sum_distances(x, (m, r)))
                return m, r, n + equals(x, m), s, c, h, hc

            return push_entropy

        sum_gaps, sum_at, sum_below = (tree2(leaf, plus, width) for leaf in (gap, at_top, below_top))

        @device
        def push_coefficients(state, x, gamma):
            m, r, n, s, c, below, below_c, at, at_c, gaps, gaps_c = state
            largest = largest_of(x, m)
            if largest > m:
                r, s, c = rise(m, r, n, s, c, largest)
                gaps, gaps_c = add(gaps, gaps_c, gap_of(below + at, largest, reference(m)))
                below, below_c = add(below, below_c, at)
                at = at_c = zero
                m, n = largest, zero
            s, c = add(s, c, sum_exponentials(x, (m, r)))
            below, below_c = add(below, below_c, sum_below(x, gamma, m))
            at, at_c = add(at, at_c, sum_at(x, gamma, m))
            gaps, gaps_c = add(gaps, gaps_c, sum_gaps(x, gamma, m))
            return m, r, n + equals(x, m), s, c, below, below_c, at, at_c, gaps, gaps_c

        return push_coefficients

    size = {"plain": 5, "entropy": 7, "coefficients": 11}[kind]
    nothing = (-infinity, -most, *(zero,) * (size - 2))

    @device
    def start():
        return nothing

    @functools.cache
    def joins(team: int) -> Any:
        """Return a function (shared, state) -> (m, n, s, below, at, gaps or entropy sum) of the team.

        s, still without all equals of m, is relative to m.
        """
        largest_of, sum_of = reduction(larger, real, team), reduction(plus, real, team)

        @device
        def share_of(state, m):
            own, r, n, s, c = state[:5]
            part = where(s == zero, zero, (s - c) * exp(r - m))
            if own == m:
                return n, part
            if n > zero:
                part = part + n * exp(own - m)
            return zero, part

        @device
        def join_plain(shared, state):
            m = largest_of(shared, state[0])
            n, s = share_of(state, m)
            return m, sum_of(shared, n), sum_of(shared, s), zero, zero, zero

        if kind == "plain":
            return join_plain

        if kind == "entropy":

            @device
            def join_entropy(shared, state):
                m = largest_of(shared, state[0])
                n, s = share_of(state, m)
                # in terms of m: the sum of e*(m - x) is that of e*(r - x) and (m - r) times that of e
                own, r = state[0], state[1]
                distance = where(state[3] == zero, zero, (state[5] - state[6]) * exp(r - m))
                if s > zero:
                    if state[3] > zero:
                        distance = distance + (state[3] - state[4]) * exp(r - m) * (m - r)
                    if own < m and state[2] > zero:
                        e = exp(own - m)
                        if e > zero:
                            distance = distance + state[2] * e * (m - own)
                return m, sum_of(shared, n), sum_of(shared, s), zero, zero, sum_of(shared, distance)

            return join_entropy

        @device
        def join_coefficients(shared, state):
            m = largest_of(shared, state[0])
            n, s = share_of(state, m)
            below, at, gaps = state[5] - state[6], state[7] - state[8], state[9] - state[10]
            gaps = gaps + gap_of(below + at, m, reference(state[0]))
            if state[0] != m:
                below, at = below + at, zero
            n, s = sum_of(shared, n), sum_of(shared, s)
            return m, n, s, sum_of(shared, below), sum_of(shared, at), sum_of(shared, gaps)

        return join_coefficients

    return SimpleNamespace(start=start, pushes=pushes, joins=joins, size=size)
