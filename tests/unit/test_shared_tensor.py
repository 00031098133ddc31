"""Tensors on lent memory: the memory's own values, never written to, and an error when the loan is over."""

import copy
import gc
import mmap
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.torch_too import torch_too  # noqa: F401 -- a fixture of every test here

from mmprep.errors import InvalidRequest, LeaseLost
from mmprep.items import storage_dtype

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
DTYPES = ("uint8", "bool", "int32", "int64", "float16", "bfloat16", "float32", "float64")


@pytest.fixture
def memory():
    """Give a function that puts an array into memory which this process maps read-only, and the writer's own mapping."""
    files = []

    def make(array):
        file = os.memfd_create("memory")
        files.append(file)
        os.ftruncate(file, max(1, array.nbytes))
        written = mmap.mmap(file, 0)
        written[: array.nbytes] = array.tobytes()
        region = memoryview(mmap.mmap(file, 0, prot=mmap.PROT_READ))[: array.nbytes]
        return np.frombuffer(region, array.dtype).reshape(array.shape), written

    yield make
    for file in files:
        os.close(file)


class Lender:
    """What lends; ``lost`` makes it say that the lease is over, after so many times more that it is asked."""

    def __init__(self):
        self.left = None

    def lost(self, after=0):
        self.left = after

    def check(self):
        if self.left == 0:
            raise LeaseLost("over")
        self.left = None if self.left is None else self.left - 1


def lent(array, dtype=None, lender=None):
    from mmprep.bridges.shared_tensor import Block, Loan, lend

    block = Block()
    return lend(array, dtype or array.dtype.name, Loan(block, (lender or Lender()).check)), block


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 3)])
def test_a_tensor_has_dtype_shape_and_bits_of_the_field(memory, torch, dtype, shape):
    array = np.random.default_rng(1).integers(0, 2, shape).astype(storage_dtype(dtype))
    tensor, _ = lent(memory(array)[0], dtype)
    assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, dtype), shape)
    own = tensor.clone()
    assert type(own) is torch.Tensor
    assert own.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_bfloat16_is_read_as_what_its_bits_stand_for(memory):
    bits = np.array([0x3F80, 0xC0A0, 0x3E20], np.uint16)
    tensor, _ = lent(memory(bits)[0], "bfloat16")
    assert tensor.float().tolist() == [1.0, -5.0, 0.15625]


def test_nothing_is_copied(memory):
    array, written = memory(VALUES)
    tensor, _ = lent(array)
    views = [tensor, tensor[1, 2], tensor.view(-1)[20:], tensor.view(6, 4).T]
    written[20 * 4 : 21 * 4] = np.float32(99.0).tobytes()
    assert [99.0 in view.tolist() or 99.0 in view.reshape(-1).tolist() for view in views] == [True] * 4


def test_the_memory_stays_mapped_as_long_as_a_tensor_or_a_view_of_it_lives(memory):
    array, _ = memory(VALUES)
    tensor, _ = lent(array)
    view = tensor[1]
    del array, tensor
    gc.collect()
    assert view.tolist() == VALUES[1].tolist()


STEPS = {
    "flatten": lambda t: t.reshape(-1),
    "first": lambda t: t[0] if t.ndim > 1 else t,
    "transpose": lambda t: t.transpose(0, -1),
    "every second": lambda t: t[::2],
    "split": lambda t: t.chunk(2)[0],
    "unsqueeze": lambda t: t.unsqueeze(0),
    "contiguous": lambda t: t.contiguous(),
    "to itself": lambda t: t.to(t.dtype),
    "detach": lambda t: t.detach(),
    "expand": lambda t: t.expand(2, *t.shape),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=6))
def test_what_lies_on_the_memory_stays_guarded_and_all_has_the_values_of_plain_tensors(torch, steps):
    from mmprep.bridges.shared_tensor import SharedTensor

    region = VALUES.copy()
    region.flags.writeable = False
    found, _ = lent(region)
    expected = torch.from_numpy(VALUES.copy())
    start, end = region.ctypes.data, region.ctypes.data + region.nbytes
    for step in steps:
        found, expected = STEPS[step](found), STEPS[step](expected)
        if type(found) is torch.Tensor:
            assert not start <= found.data_ptr() < end
        assert (found.stride(), found.storage_offset()) == (expected.stride(), expected.storage_offset())
    assert torch.equal(found, expected)
    if isinstance(found, SharedTensor):
        with pytest.raises(InvalidRequest, match="clone"):
            found.zero_()
    assert np.array_equal(region, VALUES)


def test_a_layer_computes_the_same_with_it(memory, torch):
    tensor, _ = lent(memory(VALUES)[0])
    layer = torch.nn.Conv1d(3, 5, 2)
    found = layer(tensor)
    assert type(found) is torch.Tensor
    assert torch.equal(found, layer(torch.from_numpy(VALUES.copy())))
    found.sum().backward()
    assert layer.weight.grad is not None


def test_copies_are_plain_and_stay_good(memory, torch):
    tensor, block = lent(memory(VALUES)[0])
    assert repr(tensor) == "SharedTensor(shape=(2, 3, 4), dtype=torch.float32)"
    copies = [tensor.clone(), copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor + 0, tensor.double()]
    block.over = True
    for one in copies:
        assert type(one) is torch.Tensor
        assert one.tolist() == VALUES.tolist()
        one.zero_()


# --- writing ----------------------------------------------------------------------------------------------------------

WRITES = {
    "in place": lambda t, _: t.add_(1),
    "operator": lambda t, _: t.__imul__(2),
    "an element": lambda t, _: t.__setitem__((0, 0, 0), 1.0),
    "by a mask": lambda t, _: t.__setitem__(t > 3, 0.0),
    "a view": lambda t, _: t.view(-1)[3:].zero_(),
    "a transposed view": lambda t, _: t.mT.fill_(1),
    "what unbind gives": lambda t, _: t.unbind()[1].neg_(),
    "as a result": lambda t, torch: torch.add(torch.ones(2, 3, 4), 1, out=t),
    "as one of several results": lambda t, torch: torch.max(torch.ones(2, 3, 4, 5), 3, out=(t, torch.ones(1).long())),
    "in a list": lambda t, torch: torch._foreach_mul_([torch.ones(1), t], 2.0),
    "copy": lambda t, torch: t.copy_(torch.ones(2, 3, 4)),
    "scatter": lambda t, torch: t.scatter_(0, torch.zeros(1, 1, 1, dtype=torch.long), 5.0),
    "random": lambda t, _: t.normal_(),
    "an activation": lambda t, torch: torch.nn.functional.relu(t, inplace=True),
    "resize": lambda t, _: t.resize_(100),
    "set": lambda t, torch: t.set_(torch.zeros(3)),
    "another tensor on it": lambda t, torch: torch.zeros(3).set_(t),
    "data": lambda t, torch: setattr(t, "data", torch.zeros(3)),
    "data's elements": lambda t, _: t.data.zero_(),
    "a function": lambda t, _: t.apply_(lambda value: value + 1),
    "detached": lambda t, _: t.detach().zero_(),
    "bits": lambda t, torch: t.view(torch.int32).bitwise_not_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_an_error_that_says_what_to_do(memory, torch, write):
    array, _ = memory(VALUES)
    tensor, _ = lent(array)
    with pytest.raises(InvalidRequest, match=r"write into its clone\(\)"):
        WRITES[write](tensor, torch)
    assert np.array_equal(array, VALUES)
    assert tensor.tolist() == VALUES.tolist()


POINTERS = {
    "numpy": lambda t, _: t.numpy(),
    "numpy by force": lambda t, _: t.numpy(force=True),
    "asarray": lambda t, _: np.asarray(t),
    "numpy's functions": lambda t, _: np.add(VALUES, t),
    "dlpack": lambda t, torch: torch.from_dlpack(t),
    "numpy's dlpack": lambda t, _: np.from_dlpack(t),
    "data_ptr": lambda t, _: t.data_ptr(),
    "storage": lambda t, _: t.untyped_storage(),
    "typed storage": lambda t, _: t.storage(),
    "sharing": lambda t, _: t.share_memory_(),
}


@pytest.mark.parametrize("pointer", POINTERS)
def test_its_pointer_is_not_given_away(memory, torch, pointer):
    tensor, _ = lent(memory(VALUES)[0])
    for one in (tensor, tensor[0]):
        with pytest.raises(InvalidRequest, match=r"item.view\(\) for NumPy"):
            POINTERS[pointer](one, torch)


def test_code_below_python_gets_an_exception_and_no_pointer(memory, torch):
    tensor, _ = lent(memory(VALUES)[0])
    with pytest.raises(RuntimeError, match="data pointer"):
        torch._C._to_dlpack(tensor)


# --- the end ----------------------------------------------------------------------------------------------------------

USES = {
    "clone": lambda t, _: t.clone(),
    "a view": lambda t, _: t[0],
    "an element": lambda t, _: float(t[0, 0, 0]),
    "a layer": lambda t, torch: torch.nn.Linear(4, 1)(t),
    "with others": lambda t, torch: torch.cat([torch.zeros(2, 3, 4), t]),
    "list": lambda t, _: t.tolist(),
    "pickle": lambda t, _: pickle.dumps(t),
    "into another": lambda t, torch: torch.zeros(2, 3, 4).copy_(t),
    "dtype": lambda t, _: t.half(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("end", ["block", "lease"])
def test_using_it_when_the_loan_is_over_is_an_error(memory, torch, use, end):
    lender = Lender()
    tensor, block = lent(memory(VALUES)[0], lender=lender)
    USES[use](tensor, torch)
    view = tensor.view(2, 3, 4)
    if end == "block":
        block.over = True
    else:
        lender.lost()
    for one in (tensor, view):
        with pytest.raises(LeaseLost):
            USES[use](one, torch)
    assert repr(tensor).startswith("SharedTensor")


def test_a_loan_that_ends_during_an_operation_spoils_its_result(memory):
    lender = Lender()
    tensor, _ = lent(memory(VALUES)[0], lender=lender)
    lender.lost(after=1)
    with pytest.raises(LeaseLost):
        tensor.clone()


def test_tensors_of_several_loans_each_depend_on_their_own(memory, torch):
    ones, lender = [memory(VALUES)[0] for _ in range(2)], Lender()
    first, _ = lent(ones[0], lender=lender)
    second, _ = lent(ones[1])
    assert torch.stack([first, second]).shape == (2, 2, 3, 4)
    views = torch._foreach_add([first, second], 1)
    lender.lost()
    assert second.view(-1)[5].item() == 5
    assert views[0][0, 0, 0].item() == 1
    with pytest.raises(LeaseLost):
        torch.stack([first, second])


def test_of_the_same_memory_lent_twice_each_loan_counts(memory, torch):
    array, lender = memory(VALUES)[0], Lender()
    first, _ = lent(array, lender=lender)
    second, _ = lent(array)
    lender.lost()
    for pair in ([first, second], [second, first]):
        with pytest.raises(LeaseLost):
            torch.stack(pair)
