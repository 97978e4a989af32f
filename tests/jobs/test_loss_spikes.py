"""Which losses are spikes: by hand, on losses whose mean and deviation are known."""

import math

from jobs.loss_spikes import SpikeWatch


def watch_with(losses: list[float], sigma: float = 6.0, window: int = 128) -> SpikeWatch:
    watch = SpikeWatch(window, sigma)
    assert [watch.add(loss) for loss in losses] == [None] * len(losses)
    return watch


def test_a_loss_six_deviations_above_the_mean_is_a_spike() -> None:
    # Mean 3, standard deviation 1.
    watch = watch_with([2.0, 4.0] * 10)
    assert watch.add(8.9) is None
    assert watch_with([2.0, 4.0] * 10).add(9.5) == 6.5


def test_few_losses_make_nothing_usual() -> None:
    assert watch_with([2.0, 4.0] * 7).add(1000.0) is None


def test_a_low_loss_is_none() -> None:
    assert watch_with([2.0, 4.0] * 10).add(-1000.0) is None


def test_a_spike_does_not_make_the_next_one_usual() -> None:
    watch = watch_with([2.0, 4.0] * 10)
    assert watch.add(1000.0) is not None
    assert watch.add(1000.0) is not None


def test_only_the_window_counts() -> None:
    # The last 16 are 10 and 12: mean 11, deviation 1.
    assert watch_with([10.0, 12.0] * 16, window=16).add(18.0) == 7.0


def test_what_is_not_finite_is_left_out_of_the_usual() -> None:
    watch = watch_with([2.0, 4.0] * 10)
    assert watch.add(math.nan) is None
    assert watch.add(9.5) == 6.5
