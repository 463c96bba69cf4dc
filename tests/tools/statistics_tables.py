"""Print the tables of docs/statistics.md: error rates, widths, powers and races.

python -m tests.tools.statistics_tables
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from scipy import stats

from tests.stats.drawn import (
    BLOCK,
    NOISES,
    Array,
    add_blocks,
    drops,
    error_rate,
    race_smallest,
    shuffled,
)
from tracker.analysis.paired import PairedOutcomes
from tracker.stats.accuracy import OutcomeVariance
from tracker.stats.confidence import MeanSequences

DROP_CELLS = {
    "2,000; 6 % lost, 6 % won": drops(2000, 0.06, 0.06),
    "1,500; 5 % lost, 4 % won": drops(1500, 0.05, 0.04),
    "1,000; 97 % lost": drops(1000, 0.97, 0),
    "570; half lost, half won": drops(570, 0.5, 0.5),
}
ARC_EASY = [
    *((188, 41), (169, 47), (86, 42), (33, 15), (62, 28), (45, 30), (51, 31), (40, 32), (61, 21)),
    *((63, 27), (59, 33), (134, 61), (47, 28), (48, 20), (45, 34), (48, 20), (52, 20), (37, 20)),
    *((34, 26), (29, 29), (48, 23), (57, 36), (64, 21), (72, 24), (72, 40), (27, 24), (31, 21)),
    *((60, 29), (107, 32), (118, 51)),
]
"""Of 570 documents of arc_easy, how many SmolLM2 (bfloat16) loses and wins without each layer."""
OLD_WIDTHS = {
    (400, None): {64: 86.1, 128: 35.7, 192: 20.9, 352: 7.2},
    (400, 0.05): {64: 134.4, 128: 42.9, 192: 22.0, 352: 7.0},
    (2000, None): {64: 92.2, 128: 42.5, 256: 21.8, 512: 12.8, 1024: 7.4},
    (2000, 0.05): {64: 151.4, 128: 53.6, 256: 23.9, 512: 12.4, 1024: 7.3},
}
"""What five cautious bets of any size, or one for a width, came to until 2026-11-28."""


def naive_errors(values: Array, level: float) -> float:
    """Compute the share of series that intervals for a single look miss at some look."""
    (n, count), mean, quantile = values.shape, values.mean(axis=0), stats.norm.ppf((1 + level) / 2)
    is_wrong = np.zeros(count, dtype=bool)
    for n_seen in range(BLOCK, n, BLOCK):
        error = values[:n_seen].std(axis=0, ddof=1) * math.sqrt(1 / n_seen - 1 / n)
        is_wrong |= abs(values[:n_seen].mean(axis=0) - mean) > quantile * error + 1e-9
    return float(is_wrong.mean())


def draw_arc_easy(documents: int, seed: int = 0) -> Array:
    """Draw documents that are lost and won in these shares, in random order."""
    generator = np.random.default_rng(seed)
    layers = [drops(documents, n_lost / 570, n_won / 570) for n_lost, n_won in ARC_EASY]
    return np.stack([generator.permutation(layer) for layer in layers], axis=1)


def plug_in_widths(
    drop_values: Array, look_sizes: list[int], level: float = 0.95
) -> dict[int, float]:
    """Compute the mean widths of the hedged bets of Waudby-Smith and Ramdas.

    Without replacement (section 5), with the plug-in bets of their equation 26, cut at 1/2.
    """
    (population, count), widths = drop_values.shape, {}
    x, grid = (drop_values + 1) / 2, np.linspace(0, 1, 1001)
    chance = (1 - level) / count
    logs = np.zeros((2, count, len(grid)))
    total, low, high, spread = *np.zeros((2, count)), np.ones(count), np.full(count, 0.25)
    for t in range(1, max(look_sizes) + 1):
        # √(2 log(2/α) / (σ² t log(t + 1))) with the variance spread / t
        bet = np.sqrt(2 * math.log(2 / chance) / (spread * math.log(t + 1)))[:, None]
        rest_means = (population * grid - total[:, None]) / (population - t + 1)
        for side, logs_of, side_means in ((1, logs[0], rest_means), (-1, logs[1], 1 - rest_means)):
            cut = np.minimum(bet, 0.5 / np.maximum(side_means, 1e-9))
            logs_of += np.log(np.maximum(1 + side * cut * (x[t - 1][:, None] - rest_means), 1e-300))
        total += x[t - 1]
        spread += (x[t - 1] - (0.5 + total) / (t + 1)) ** 2
        if t in look_sizes:
            is_rejected = logs >= math.log(2 / chance)
            low = np.maximum(
                low, np.where(is_rejected[0], grid, total[:, None] / population).max(axis=1)
            )
            largest_means = (total + population - t)[:, None] / population
            high = np.minimum(high, np.where(is_rejected[1], grid, largest_means).min(axis=1))
            widths[t] = 200 * float((high - low).mean())
    return widths


def mean_widths(
    drop_values: Array, look_sizes: list[int], within: float | None = None
) -> dict[int, float]:
    """Compute the mean widths of our sequences."""
    sequence = MeanSequences(*drop_values.shape, half_width=within)
    return {
        n_seen: 100 * float((sequence.high - sequence.low).mean())
        for n_seen in add_blocks(sequence, drop_values[: max(look_sizes)])
        if n_seen in look_sizes
    }


def width_lines() -> Iterator[str]:
    """Compute the table of widths."""
    for (documents, within), old_widths in OLD_WIDTHS.items():
        drop_values = draw_arc_easy(documents)
        rows = {"before": old_widths, "now": mean_widths(drop_values, list(old_widths), within)}
        if within is None:
            rows["plug-in"] = plug_in_widths(drop_values, list(old_widths))
        for name, row in rows.items():
            widths = ", ".join(f"{n_seen}: {width:.1f}" for n_seen, width in row.items())
            yield f"{documents} documents, within {within}, {name}: {widths}"


def exact_power(documents: int, share: float) -> float:
    """Compute how often the exact McNemar test finds the drop that so many documents reveal."""
    drop = OutcomeVariance(share, binary=True).detectable_change(documents)
    changed = np.arange(1, documents + 1)
    # The most that may be won, or lost, of so many changes where the test is significant.
    limit = stats.binom.ppf(0.025, changed, 0.5)
    limit -= stats.binom.cdf(limit, changed, 0.5) > 0.025
    lost_distribution = stats.binom(changed, (share + drop) / (2 * share))
    significant = lost_distribution.cdf(limit) + lost_distribution.sf(changed - limit - 1)
    return float(stats.binom.pmf(changed, documents, share) @ significant)


def exact_powers() -> list[float]:
    """Compute the power of the exact test over the cells that docs/statistics.md names."""
    shares = (0.1, 0.2, 0.3, 0.4, 0.5)
    return [exact_power(documents, share) for documents in range(100, 1001, 50) for share in shares]


def race_lines(population: int, draws: int = 40) -> Iterator[str]:
    """Race 270 candidates: how much is looked at, and how many winners are wrong."""
    for name, noise in NOISES.items():
        generator, n_wrong, shares = np.random.default_rng(7), 0, []
        for _ in range(draws):
            values = 0.2 * noise(generator, (population, 270)) + generator.exponential(0.05, 270)
            race, truth = race_smallest(values, 0.01), values.mean(axis=0)
            n_wrong += truth[race.chosen].max() > truth.min() + 0.01
            shares.append(race.seen.mean() / population)
        yield f"{population} documents, {name}: {np.mean(shares):.0%}, {n_wrong} of {draws} wrong"


def cluster_errors(n_clusters: int, size: int, strength: float, draws: int = 4000) -> list[float]:
    """Compute how often 95 % intervals miss a drop of 0: by clusters, then by documents.

    A removal loses or wins 30 % of the documents. In one half of the clusters it rather loses them,
    in the other it rather wins them.
    """
    generator, n_missed = np.random.default_rng(0), np.zeros(2)
    clusters = np.repeat(np.arange(n_clusters), size)
    weights = np.full(len(clusters), 1 / len(clusters))
    for _ in range(draws):
        leaning = strength * generator.choice([-1, 1], n_clusters)[clusters]
        is_changed = generator.random(len(clusters)) < 0.3
        is_lost = generator.random(len(clusters)) < (1 + leaning) / 2
        intact = np.where(is_changed, is_lost, generator.random(len(clusters)) < 0.5).astype(float)
        ablated = np.where(is_changed, ~is_lost, intact).astype(float)[:, None]
        for index, groups in enumerate((clusters, None)):
            drop = PairedOutcomes(intact, ablated, weights, clusters=groups).drop(0)
            n_missed[index] += bool(drop.side())
    return (n_missed / draws).tolist()


def cluster_lines() -> Iterator[str]:
    """Compute the table of clusters."""
    for case in ((20, 10, 0.0), (20, 10, 0.5), (57, 10, 0.5), (57, 10, 1.0), (400, 2, 1.0)):
        errors = ", ".join(f"{error:.1%}" for error in cluster_errors(*case))
        yield "{} clusters of {}, strength {}: {}".format(*case, errors)


if __name__ == "__main__":
    print(*cluster_lines(), sep="\n")  # noqa: T201
    for name, cell in DROP_CELLS.items():
        orders = shuffled(cell, 400)
        print(f"{name}: {error_rate(orders, 0.95):.1%}, {naive_errors(orders, 0.95):.0%}")  # noqa: T201
    print(*width_lines(), sep="\n")  # noqa: T201
    print(f"power of the exact test: {min(exact_powers()):.3f} to {max(exact_powers()):.3f}")  # noqa: T201
    print(*race_lines(1188), *race_lines(5000), sep="\n")  # noqa: T201
