"""What one thread keeps of the classes it has seen, and how a team's threads bring it together.

A state is (m, r, n, s, c, ...): m is the largest logit and n how often it was met; s is the sum of exp(x - r)
over the others, c what its last addition lost. r follows m only when m has grown by more than one nat: so
a slowly rising row rescales its sum seldom, and the errors of that do not add up. All equals of the largest
stay out of the sum, and others = s*exp(r - m) + (n - 1) keeps its relative precision however far the largest
is ahead. Coefficients by class add the sums of gamma below m and at m, and of gamma*(m - x); the entropy adds
the sum of exp(x - r)*(r - x), to which the figures add that of exp(x - r)**2, how many classes come before
the label's, and where m was met first. All sums are compensated.

The threads of a team find their largest logit first, then express their sums in it and add: one exponential a
thread, where merging pairs would take one a step.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from logitloss._kernels.cuda_figures import first_equal, runs
from logitloss._kernels.cuda_memory import device
from logitloss._kernels.cuda_steps import larger, machine, of_warp, plus, reduction, smaller, tree, tree2

# Classes counted, and where m was first, before any is met: further than any class, whatever is added.
NONE, NOWHERE = np.int64(0), np.int64(2**62)


@functools.cache
def statistics(real: type, kind: str) -> SimpleNamespace:
    """Return start, push and finish of states; `kind` is "plain", "coefficients", "entropy" or "figures"."""
    steps = machine(real)
    zero, one = real(0), real(1)
    infinity, most = real(np.inf), real(np.finfo(real).max)
    exp, gap_of, where = steps.exp, steps.gap_of, steps.where
    absolute, bounded, exp_bounded = steps.absolute, steps.bounded, steps.exp_bounded

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
        """Let a new largest logit take the place of m.

        Return r, s, c, the exponential of the old m, and the factor by which those of before went down.
        """
        e, factor = zero, one
        if n > zero:
            e = exp(m - r)
            s, c = add(s, c, n * e)
        if largest > r + one:
            new = largest if largest < most else most
            factor = exp(r - new)
            s, c, r = s * factor, c * factor, new
        return r, s, c, e, factor

    @device
    def rise_of_distances(m, r, n, s, c, h, lost, largest):
        """Do the same with the sum of exp(x - r)*(r - x) beside the others."""
        old = r
        r, s, c, e, factor = rise(m, r, n, s, c, largest)
        h, lost = add(h, lost, -(n * e * bounded(m - old)))
        h, lost = h * factor - (s - c) * bounded(old - r), lost * factor
        return r, s, c, h, lost, e, factor

    @functools.cache
    def pushes(run: int, at_once: int = 1, together: bool = False) -> Any:
        """Return a function (state, logits, gammas) -> state that takes in so many runs of classes at once.

        In the place of gammas, figures have what cuda_figures says. Where a warp goes `together`, its threads
        let m rise together: it then rises for some of a row's runs, and not for some thread in almost each.
        """
        width = run * at_once
        largest_of, equals = tree(itself, larger, width), tree(is_top, plus, width)
        sum_exponentials = tree(exponential, plus, width)

        @device
        def push_plain(state, x, gamma):
            m, r, n, s, c = state
            largest = largest_of(x, m)
            if largest > m:
                r, s, c, _, _ = rise(m, r, n, s, c, largest)
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
                    r, s, c, h, hc, _, _ = rise_of_distances(m, r, n, s, c, h, hc, largest)
                    m, n = largest, zero
                s, c = add(s, c, sum_exponentials(x, (m, r)))
                h, hc = add(h, hc, sum_distances(x, (m, r)))
                return m, r, n + equals(x, m), s, c, h, hc

            return push_entropy

        if kind == "figures":
            sums_of, first_of, length = runs(real, run, at_once), first_equal(width), np.int64(run)
            # one instruction each, and registers that other kernels do not have
            largest_of = tree(itself, steps.larger, width)
            any_of_warp, largest_of_warp = of_warp(real)

            @device
            def push_figures(state, x, begin):
                m, r, n, s, c, h, hc, q, qc, before, top = state
                own_largest = largest_of(x, m)
                largest = own_largest
                if together:
                    largest = largest_of_warp(own_largest) if any_of_warp(own_largest > m) else m
                if largest > m:
                    r, s, c, h, hc, e, factor = rise_of_distances(m, r, n, s, c, h, hc, largest)
                    q, qc = add(q, qc, n * e * e)
                    q, qc = q * factor * factor, qc * factor * factor
                    m, n, top = largest, zero, NOWHERE
                k = begin[0]
                # What comes after the last whole sixteen bytes has been met already.
                if own_largest == m and k < top:
                    number = first_of(x, m)
                    top = k + number // length * begin[1] + number % length
                sums = sums_of(x, m, r, begin, k, (zero, zero, zero))
                s, c = add(s, c, sums[0])
                h, hc = add(h, hc, sums[1])
                q, qc = add(q, qc, sums[2])
                return m, r, n + equals(x, m), s, c, h, hc, q, qc, before + np.int64(sums[3]), top

            return push_figures

        sum_gaps, sum_at, sum_below = (tree2(leaf, plus, width) for leaf in (gap, at_top, below_top))

        @device
        def push_coefficients(state, x, gamma):
            m, r, n, s, c, below, below_c, at, at_c, gaps, gaps_c = state
            largest = largest_of(x, m)
            if largest > m:
                r, s, c, _, _ = rise(m, r, n, s, c, largest)
                if m > -infinity:  # gaps from 0 are infinite already, or nothing
                    gaps, gaps_c = add(gaps, gaps_c, gap_of(below + at, largest, m))
                below, below_c = add(below, below_c, at)
                at = at_c = zero
                m, n = largest, zero
            s, c = add(s, c, sum_exponentials(x, (m, r)))
            below, below_c = add(below, below_c, sum_below(x, gamma, m))
            at, at_c = add(at, at_c, sum_at(x, gamma, m))
            gaps, gaps_c = add(gaps, gaps_c, sum_gaps(x, gamma, m))
            return m, r, n + equals(x, m), s, c, below, below_c, at, at_c, gaps, gaps_c

        return push_coefficients

    size = {"plain": 5, "entropy": 7, "coefficients": 11, "figures": 9}[kind]
    nothing = (-infinity, -most, *(zero,) * (size - 2))
    if kind == "figures":
        nothing = (*nothing, NONE, NOWHERE)

    @device
    def start():
        return nothing

    @functools.cache
    def joins(team: int) -> Any:
        """Return a function (shared, shared_integer, state) -> (m, n, s, below, at, gaps) of the team.

        s, still without all equals of m, is relative to m, and so is the sum of exp(x - m)*(m - x) that the
        entropy and the figures have as gaps. These have that of squares as below, and in the end how many
        classes come before the label's, and the first of m.
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
        def distance_of(state, m):
            """Return the sum of exp(x - m)*(m - x), the factor that takes r to m, and the own m's e, or 0."""
            own, r, n, s, c, h, hc = state[:7]
            to_m, own_to_m = bounded(r - m), bounded(own - m)
            down, e = exp_bounded(to_m), where(own < m, exp_bounded(own_to_m), zero)
            return (h - hc) * down - (s - c) * down * to_m - n * e * own_to_m, down, e

        @device
        def join_plain(shared, shared_integer, state):
            m = largest_of(shared, state[0])
            n, s = share_of(state, m)
            return m, sum_of(shared, n), sum_of(shared, s), zero, zero, zero

        if kind == "plain":
            return join_plain

        if kind == "entropy":

            @device
            def join_entropy(shared, shared_integer, state):
                m = largest_of(shared, state[0])
                n, s = share_of(state, m)
                distance = sum_of(shared, distance_of(state, m)[0])
                return m, sum_of(shared, n), sum_of(shared, s), zero, zero, distance

            return join_entropy

        if kind == "figures":
            first_of = reduction(smaller, np.int64, team)
            count_of = reduction(plus, np.int64, team)

            @device
            def join_figures(shared, shared_integer, state):
                m = largest_of(shared, state[0])
                n, s = share_of(state, m)
                distance, down, e = distance_of(state, m)
                squares = sum_of(shared, (state[7] - state[8]) * down * down + state[2] * e * e)
                n, s, distance = sum_of(shared, n), sum_of(shared, s), sum_of(shared, distance)
                before = count_of(shared_integer, state[9])
                top = first_of(shared_integer, state[10] if state[0] == m else NOWHERE)
                return m, n, s, squares, zero, distance, before, top

            return join_figures

        @device
        def join_coefficients(shared, shared_integer, state):
            m = largest_of(shared, state[0])
            n, s = share_of(state, m)
            below, at, gaps = state[5] - state[6], state[7] - state[8], state[9] - state[10]
            gaps = gaps + (gap_of(below + at, m, state[0]) if state[0] > -infinity else zero)
            if state[0] != m:
                below, at = below + at, zero
            n, s = sum_of(shared, n), sum_of(shared, s)
            return m, n, s, sum_of(shared, below), sum_of(shared, at), sum_of(shared, gaps)

        return join_coefficients

    return SimpleNamespace(start=start, pushes=pushes, joins=joins, size=size)
