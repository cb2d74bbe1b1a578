# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens from a text and from datasets on disk: the same documents in every file format."""

import json
import shutil
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch

from offline_quant import calibration_data
from offline_quant.calibration_data import calibration_text, calibration_tokens, tokenize
from offline_quant.plan import Settings
from offline_quant.quantize_checkpoint import quantize_checkpoint
from pvq_vllm.codec.errors import PVQError

DOCUMENTS = [f"Document {number}: " + "all work and no play " * (number % 5 + 1) for number in range(40)]


@pytest.fixture(params=["jsonl", "parquet", "folder of parquet", "save_to_disk"])
def dataset(request, tmp_path):
    """The same 40 documents in four formats."""
    rows = [{"text": text, "source": "test"} for text in DOCUMENTS]
    if request.param == "jsonl":
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    if request.param == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
        return tmp_path / "data.parquet"
    folder = tmp_path / "data"
    folder.mkdir()
    for index, half in enumerate((rows[:15], rows[15:])):
        table = pyarrow.Table.from_pylist(half)
        if request.param == "save_to_disk":
            path = str(folder / f"data-{index}.arrow")
            with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        else:
            pyarrow.parquet.write_table(table, folder / f"part-{index}.parquet")
    if request.param == "save_to_disk":
        names = [{"filename": f"data-{index}.arrow"} for index in range(2)]
        (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    return folder


def test_a_dataset_gives_its_documents_each_ended_by_the_end_token(tiny_llama, dataset):
    tokenizer = calibration_data.load_tokenizer(tiny_llama)
    expected = []
    for text in DOCUMENTS:
        expected += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    length = len(expected) // 10
    everything = calibration_tokens(tiny_llama, dataset, 10, length)
    assert everything[0].tolist() == expected[:length]
    assert everything[-1].tolist() == expected[-length:]


def test_documents_are_taken_evenly_over_the_dataset(tiny_llama, dataset):
    few = calibration_tokens(tiny_llama, dataset, 1, 30)  # 4 documents are enough: 0, 10, 20 and 30
    tokenizer = calibration_data.load_tokenizer(tiny_llama)
    expected = []
    for number in (0, 10, 20, 30):
        ids = tokenizer(DOCUMENTS[number], add_special_tokens=False)["input_ids"]
        expected += ids + [tokenizer.eos_token_id]
    assert few[0].tolist() == expected[:30]


def test_messages_go_through_the_chat_template(tiny_llama, tmp_path):
    messages = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    tokenizer = calibration_data.load_tokenizer(tiny_llama)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<|user|>" in text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert calibration_tokens(tiny_llama, tmp_path / "chat.jsonl", 1, len(ids))[0].tolist() == ids
    bare = shutil.copytree(tiny_llama, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(PVQError, match="has no chat template"):
        calibration_tokens(bare, tmp_path / "chat.jsonl", 1, 4)


def test_a_model_is_quantized_with_a_dataset(tiny_llama, dataset, tmp_path):
    settings = Settings(calibration=str(dataset), calibration_sequences=3, calibration_length=40)
    report = quantize_checkpoint(tiny_llama, tmp_path / "out", settings)
    assert report["calibration_tokens"] == 120


def test_windows_are_spread_over_the_whole_text(tiny_llama):
    everything = tokenize(tiny_llama, calibration_text())
    found = calibration_tokens(tiny_llama, "builtin", 7, 100)
    assert found.shape == (7, 100)
    assert torch.equal(found[0], everything[:100]) and torch.equal(found[-1], everything[-100:])
    with pytest.raises(PVQError, match="fewer than 7000 x 1000"):
        calibration_tokens(tiny_llama, "builtin", 7000, 1000)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("image.txt", b"\xff\xfe\x00\xd8", r"image\.txt cannot be read as a UTF-8 text"),
        ("broken.jsonl", b'{"text": ', r"broken\.jsonl cannot be read as JSON lines"),
        ("list.jsonl", b"[1, 2]\n", r"list\.jsonl, line 1: not a JSON object"),
        ("other.jsonl", b'{"body": "x"}\n', r"other\.jsonl has the columns body and needs 'text'"),
        ("short.jsonl", b'{"text": "x"}\n', r"short\.jsonl has 2 tokens, fewer than 4 x 8"),
        ("empty.jsonl", b"", r"empty\.jsonl has 0 tokens, fewer than 4 x 8"),
        ("broken.parquet", b"PAR1", r"broken\.parquet cannot be read"),
    ],
)
def test_data_that_cannot_be_used_is_named(tiny_llama, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PVQError, match=says):
        calibration_tokens(tiny_llama, tmp_path / name, 4, 8)


def test_folders_that_are_no_dataset_are_named(tiny_llama, tmp_path):
    with pytest.raises(PVQError, match=r"no \.parquet, \.jsonl or \.arrow file is in this folder"):
        calibration_tokens(tiny_llama, tmp_path, 1, 1)
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(PVQError, match="holds the splits train: name one of these folders"):
        calibration_tokens(tiny_llama, tmp_path, 1, 1)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], "test, train"),
        (["train.jsonl", "val.jsonl", "test.jsonl"], "test, train, validation"),
        (["train_sft-00000-of-00002.jsonl", "test_sft-00000-of-00001.jsonl"], "test, train"),
        (["default/train/0000.jsonl", "default/validation/0000.jsonl"], "train, validation"),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], None),
        (["train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"], None),
        (["test/0000.jsonl", "test/0001.jsonl"], None),
        (["part-0.jsonl", "contest.jsonl", "latest-train.jsonl"], None),
    ],
)
def test_a_folder_of_several_splits_is_refused(tmp_path, names, splits):
    """Calibrating on the split that one tests on would spoil every later measurement."""
    folder = tmp_path / "test-data"  # the name of the folder itself tells nothing
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}\n')
    if splits is None:
        assert calibration_data.table_files(folder) == sorted(folder / name for name in names)
        return
    with pytest.raises(PVQError, match=f"holds files of the splits {splits}: name the file of one split"):
        calibration_data.table_files(folder)


def test_without_pyarrow_the_package_is_named(tiny_llama, tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}]), tmp_path / "data.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PVQError, match=r"data\.parquet needs the package pyarrow: pip install pyarrow"):
        calibration_tokens(tiny_llama, tmp_path / "data.parquet", 1, 1)
