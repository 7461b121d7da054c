"""The engine's cost and a save's stall, measured; loose bounds, since the machine is shared."""
import pytest

from tools import benchmark_engine


def test_the_measurement_says_what_it_measured(tmp_path):
    result = benchmark_engine.measure(input_size=32, batch_size=2, rounds=1, steps=1, folder=str(tmp_path))
    assert result['bare_step_ms'] > 0 and result['torch_save_ms'] > 0
    assert all(value['min'] > 0 for name, value in result.items() if name.startswith('ratio_'))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_engine_costs_little_over_a_bare_loop_and_a_save_hardly_stalls():
    result = benchmark_engine.measure(rounds=9, steps=3)
    print(result)
    # On an idle machine at most 1.02, 1.05 with the average, and 0.2
    assert result['ratio_engine']['median'] < 1.10
    assert result['ratio_engine_ema']['median'] < 1.10
    assert result['ratio_save_stall']['median'] < 0.4
