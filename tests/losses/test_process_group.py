"""Two gloo processes with uneven shares against one process that holds everything."""

import json

import pytest
import torch
import two_processes
from torch import multiprocessing

WORLD = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(two_processes.run, args=(WORLD, str(folder)), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", two_processes.CASES)
def test_two_processes_agree_with_one(found, case, dtype, tolerance):
    # In float32 both are rounded: the yardstick is the float64 result, the error allowed that of float32.
    value, *gradients = two_processes.solve(case, torch.float64)
    for rank in range(WORLD):
        its_value, *its_gradients = found[rank]["results"][f"{case} {dtype}"]
        assert its_value == pytest.approx(value, rel=tolerance if dtype == torch.float64 else 2e-4)
        for one, other in zip(its_gradients, gradients, strict=True):
            one, other = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
            assert (one - other).norm() <= max(tolerance, 1e-9) * max(1.0, float(other.norm()))


def test_ddp_leaves_the_gradient_of_one_process(found):
    for rank in range(WORLD):
        for one, other in zip(found[rank]["ddp"], two_processes.solve_with_ddp(), strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-6, atol=1e-7)


# Row 1 of the second process is row 5 of all; a process does not know the tokens of others.
NAN, OTHERS = "x must be finite; row 5 is NaN", "x must have the same D and dtype on every process"
REFUSALS = {
    **dict.fromkeys(("cs nan", "info_nce nan"), (NAN, NAN)),
    **dict.fromkeys(("cs width", "cs dtype", "info_nce width", "info_nce dtype"), (OTHERS, OTHERS)),
    "tokens nan": ("the processes [1] of the group found bad input", "x_tokens must be finite; rows [0]"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_every_process_refuses_the_bad_input_of_one(found, kind):
    for rank in range(WORLD):
        assert REFUSALS[kind][rank] in found[rank]["refusals"][kind]
