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


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        ("{{ raise_exception('no system role') }}", [{"role": "system", "content": "x"}], "no system role"),
        ("{{ messages[0]['content'] + '!' }}", [{"role": "user", "content": None}], "NoneType"),
    ],
)
def test_messages_that_the_chat_template_refuses_are_named(tiny_llama, tmp_path, template, messages, says):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "chat.jsonl").write_text("\n" + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(PVQError, match=rf"chat\.jsonl, line 2: the chat template .* \(.*{says}"):
        calibration_tokens(folder, tmp_path / "chat.jsonl", 1, 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_without_a_value_are_left_out(tiny_llama, tmp_path, suffix):
    message = {"role": "user", "content": "Hello"}
    rows = [{"text": text, "messages": None} for text in (*DOCUMENTS[:2], None, *DOCUMENTS[2:4], None)]
    rows += [{"text": None, "messages": []}, {"text": None, "messages": [message]}]
    sparse, dense = tmp_path / f"sparse{suffix}", tmp_path / f"dense{suffix}"
    for path, kept in ((sparse, rows), (dense, [row for row in rows if row["text"] or row["messages"]])):
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(kept), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    found, expected = (calibration_tokens(tiny_llama, path, 5, 20) for path in (sparse, dense))
    assert torch.equal(found, expected)


def test_the_case_of_a_suffix_does_not_matter(tiny_llama, tmp_path):
    for folder, suffixes in (("upper", (".JSONL", ".Parquet")), ("lower", (".jsonl", ".parquet"))):
        (tmp_path / folder).mkdir()
        rows = [{"text": text} for text in DOCUMENTS]
        (tmp_path / folder / f"data{suffixes[0]}").write_text("\n".join(map(json.dumps, rows)))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / folder / f"more{suffixes[1]}")
    assert torch.equal(
        *(calibration_tokens(tiny_llama, tmp_path / one, 10, 50) for one in ("upper", "lower"))
    )
    one = calibration_tokens(tiny_llama, tmp_path / "upper" / "data.JSONL", 4, 50)
    assert torch.equal(one, calibration_tokens(tiny_llama, tmp_path / "lower" / "data.jsonl", 4, 50))


def test_a_tokenizer_of_another_model_is_an_error_before_anything_is_written(
    tiny_llama, tmp_path, monkeypatch
):
    class Larger:
        eos_token_id = 1

        def __call__(self, text, **options):
            return {"input_ids": [600] * 100}

    monkeypatch.setattr(calibration_data, "load_tokenizer", lambda folder: Larger())
    settings = Settings(calibration="builtin", calibration_sequences=2, calibration_length=32)
    with pytest.raises(PVQError, match="gives token 600, but the model's embedding has only 512 rows"):
        quantize_checkpoint(tiny_llama, tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())


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
        ("other.jsonl", b'{"body": "x"}\n', r"other\.jsonl, line 1 has the columns body and needs 'text'"),
        ("number.jsonl", b'{"text": "x"}\n{"text": 5}\n', r"number\.jsonl, line 2: 'text' must be a string"),
        ("words.jsonl", b'{"messages": ["x"]}\n', r"words\.jsonl, line 1: .* 'messages' a list of role"),
        ("null.jsonl", b'{"text": null}\n', r"null\.jsonl has 0 tokens, fewer than 4 x 8"),
        ("rows.json", b'[{"text": "x"}]', r"rows\.json: \.json files are not read: convert it to \.jsonl"),
        ("rows.CSV", b"text\nx\n", r"rows\.CSV: \.csv files are not read: convert it to \.jsonl"),
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
    with pytest.raises(PVQError, match=r"typo\.jsonl cannot be read .*No such file"):
        calibration_tokens(tiny_llama, tmp_path / "typo.jsonl", 1, 1)
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
