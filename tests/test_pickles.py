"""The restricted unpickler: it makes arrays of numbers, and nothing that runs or changes anything."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from dilformer_jax.io import pickles
from dilformer_jax.io.pickles import ADMITTED, read_arrays
from dilformer_jax.io.volumes import BadInput

IMAGE = np.random.default_rng(0).random((3, 4, 5))
LABELS = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)


class Call:
    """Pickled, a call that an ordinary unpickler makes."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(path: Path, content: object, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_arrays_of_every_protocol_and_layout_are_read(tmp_path, protocol, axes):
    arrays = (IMAGE.transpose(axes), LABELS[:, ::2], IMAGE.astype(">f4"), LABELS > 7)
    found = read_arrays(saved(tmp_path / "p_1_2.pkl", arrays, protocol))
    assert [array.dtype for array in found] == [array.dtype for array in arrays]
    for its, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(its, array)


@pytest.mark.parametrize(("old", "new"), [("numpy._core", "numpy.core"), ("numpy.core", "numpy._core")])
def test_arrays_pickled_by_either_numpy_are_read(tmp_path, old, new):
    # Protocol 0 spells names out as lines of text, so that they can be exchanged.
    content = pickle.dumps((IMAGE, LABELS), 0).replace(old.encode(), new.encode())
    assert new.encode() in content
    path = tmp_path / "subject_1.pkl"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_arrays(path)[1], LABELS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "smuggled",
    [
        lambda call: (IMAGE, LABELS, call),
        lambda call: (np.array([call], dtype=object), LABELS),  # the state of an array of objects is a list of them
        lambda call: {"image": IMAGE, "labels": call},
        lambda call: call,
    ],
)
def test_os_system_is_refused_by_name_and_not_run(tmp_path, protocol, smuggled):
    made = tmp_path / "made"
    path = saved(tmp_path / "evil.pkl", smuggled(Call(os.system, f"touch {made}")), protocol)
    with pytest.raises(BadInput, match=rf"evil\.pkl is no whole pickle .*it asks for {os.name}\.system") as caught:
        read_arrays(path)
    assert not made.exists() and str(caught.value).count("\n") == 0
    pickle.loads(path.read_bytes())
    assert made.exists(), "the trap does not work, so that this test shows nothing"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ((np.array([1, "a"], dtype=object), LABELS), "does not consist of numbers"),
        ((IMAGE.astype("U4"), LABELS), "type 'U4'"),
        ((np.zeros(3, [("a", "f4")]), LABELS), "type 'V4'"),
        ((IMAGE, "labels"), "it holds a str"),
        (IMAGE, "it holds one array"),
        ({"image": IMAGE}, "it holds a dict"),
        ((IMAGE, np.float32(1)), "numpy.*scalar"),
        (Path("a"), "pathlib"),
        (Call(eval, "1"), "builtins.eval"),
        (Call(np.load, "a.npy", None, True), "numpy"),
    ],
)
def test_other_contents_are_refused_by_name(tmp_path, content, said):
    with pytest.raises(BadInput, match=rf"subject_1\.pkl is no whole pickle of plain NumPy arrays \(.*{said}"):
        read_arrays(saved(tmp_path / "subject_1.pkl", content))


def test_encodings_other_than_that_of_bytes_are_not_looked_up(tmp_path):
    import _codecs

    path = saved(tmp_path / "a.pkl", Call(_codecs.encode, "x" * 100, "punycode"))
    with pytest.raises(BadInput, match="the encoding 'punycode'"):
        read_arrays(path)


@pytest.mark.parametrize("name", ["numpy\nndarray", "numpy\ndtype", "numpy.core.numeric\n_frombuffer"])
@pytest.mark.parametrize("state", [{"__call__": 1}, (None, {"__defaults__": (1,), "_make": 1})])
def test_what_a_pickle_may_call_cannot_be_changed_by_it(tmp_path, name, state):
    before = dict(ADMITTED)
    path = tmp_path / "a.pkl"
    # GLOBAL name, its new state, BUILD, STOP
    path.write_bytes(b"c" + name.encode() + b"\n" + pickle.dumps(state, 0)[:-1] + b"b.")
    with pytest.raises(BadInput, match="it changes what it was given"):
        read_arrays(path)
    assert before == ADMITTED
    np.testing.assert_array_equal(read_arrays(saved(path, (IMAGE, LABELS)))[0], IMAGE)


@pytest.mark.parametrize(
    ("shape", "data", "said"),
    [
        ((3,), b"abcd", r"shape \(3,\) has 4 bytes"),
        ((-1,), b"abcd", "no shape"),
        ((1 << 62, 4), b"", "bytes"),
        ((1,), [1], "consist of numbers"),
        ((1,), 5, "consist of numbers"),
    ],
)
def test_states_that_do_not_fit_are_refused(tmp_path, shape, data, said):
    # numpy.ndarray() and its state, whose type is put where the marker stands.
    state = pickle.dumps((1, shape, "marker", False, data), 3)[2:-1]
    kind = pickle.dumps(np.dtype("f8"), 3)[2:-1]
    for index in range(9, -1, -1):  # what either remembers is never asked for again
        state, kind = (part.replace(b"q" + bytes([index]), b"") for part in (state, kind))
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x03cnumpy\nndarray\n)R" + state.replace(b"X\x06\x00\x00\x00marker", kind) + b"b\x85.")
    with pytest.raises(BadInput, match=said):
        read_arrays(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x05\x8e" + struct.pack("<Q", 1 << 40) + b"abc.", "expected"),  # bytes that are not there
        (b"\x80\x02K\x01r" + struct.pack("<I", 0xFFFFFFF0) + b".", "remembers"),  # a table of 4 G entries
        (b"\x80\x02" + b"N0" * 9000 + b"N.", "steps"),
        (b"\x80\x05\x97\x85.", "out-of-band"),  # a buffer of protocol 5 that travels apart
        (b"\x80\x02Pid\n.", "persistent"),
    ],
)
def test_little_files_do_not_take_much_memory(tmp_path, content, said):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=rf"bomb\.pkl .*{said}"):
        read_arrays(path)


def test_damaged_and_missing_files_are_named(tmp_path):
    path = tmp_path / "subject_1.pkl"
    with pytest.raises(BadInput, match=r"subject_1\.pkl does not exist"):
        read_arrays(path)
    whole = pickle.dumps((IMAGE, LABELS))
    for length in (0, 1, 20, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"subject_1\.pkl is no whole pickle"):
            read_arrays(path)
    path.write_text("a text")
    with pytest.raises(BadInput, match=r"subject_1\.pkl is no whole pickle"):
        read_arrays(path)


def test_an_unpickler_without_the_checks_before_it_asks_for_nothing_either():
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system|nt\.system"):
        pickles.ArrayUnpickler(pickle.dumps(Call(os.system, "true"))).load()
