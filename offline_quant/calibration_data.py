# SPDX-License-Identifier: Apache-2.0
"""Where calibration tokens come from: a text, or a Hugging Face dataset on disk. (From the model itself:
``self_calibration``.)

All of a source is represented: a text gives windows evenly spaced over it, a dataset documents evenly spaced
over its rows. Nothing is drawn at random.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from pvq_vllm.codec.errors import PVQError

BUILTIN, SELF = "builtin", "self"  # instead of a path
TABLES = (".parquet", ".jsonl", ".arrow")
OTHER_TABLES = (".json", ".csv", ".tsv")  # not read as tables, and not meant to be read as plain text
SPLITS = {  # and the words that name them, as in the library datasets
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
DOCUMENTS_PER_SEQUENCE = 4  # taken at first; twice as many as long as they are too short


def calibration_text() -> Path:
    """Return the path of the calibration text that ships with the project."""
    return Path(__file__).parent / "data" / "calibration.txt"


def calibration_tokens(
    folder: Path, source: str | Path, sequences: int, length: int, vocabulary: int | None = None
) -> torch.Tensor:
    """Return int64 [sequences, length].

    Args:
        folder: of the model, for its tokenizer and chat template.
        source: 'builtin', a UTF-8 text, a .parquet or .jsonl file, or a folder of such files or of
            ``datasets.save_to_disk``. A table has a column 'text', or 'messages' for the chat template; rows
            without either value are left out.
        vocabulary: rows of the model's embedding, which the tokens may not exceed.
    Raises:
        PVQError: the source is too short or cannot be read, or the folder has no tokenizer, or one of another
            model.
    """
    path = calibration_text() if str(source) == BUILTIN else Path(source)
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix in OTHER_TABLES:
        raise PVQError(
            f"--calibration {path}: {suffix} files are not read: convert it to .jsonl or .parquet, with a column "
            "'text' or 'messages', or name it .txt to have it read as plain text"
        )
    is_table = path.is_dir() or suffix in TABLES
    ids = _tokens_of_tables(folder, path, sequences, length) if is_table else tokenize(folder, path)
    _check_length(ids, path, sequences, length)
    tokens = windows(ids, sequences, length)
    if vocabulary is not None:
        check_vocabulary(tokens, folder, vocabulary)
    return tokens


def check_vocabulary(tokens: torch.Tensor, folder: Path, vocabulary: int) -> None:
    """Raise PVQError if the embedding of the model in ``folder``, of ``vocabulary`` rows, has none for a token."""
    if tokens.max() >= vocabulary:
        raise PVQError(
            f"{folder}: the tokenizer gives token {tokens.max()}, but the model's embedding has only {vocabulary} "
            "rows: copy the tokenizer of this very model into the folder"
        )


def _tokens_of_tables(folder: Path, path: Path, sequences: int, length: int) -> torch.Tensor:
    """Return at least ``sequences * length`` tokens, or those of all documents."""
    files = table_files(path)
    total = sum(1 for file in files for _ in _rows(file))
    tokenizer = load_tokenizer(folder)
    wanted = min(total, DOCUMENTS_PER_SEQUENCE * sequences)
    while True:
        ids = _tokens_of_documents(files, total, wanted, tokenizer)
        if len(ids) >= sequences * length or wanted == total:
            return ids
        wanted = min(total, 2 * wanted)


def windows(ids: torch.Tensor, sequences: int, length: int) -> torch.Tensor:
    """Return [sequences, length]: windows that are evenly spaced over ``ids`` and do not overlap."""
    spare = len(ids) - sequences * length
    starts = [index * length + spare * index // max(1, sequences - 1) for index in range(sequences)]
    return torch.stack([ids[start : start + length] for start in starts])


def _check_length(ids: torch.Tensor, path: Path, sequences: int, length: int) -> None:
    if len(ids) < sequences * length:
        raise PVQError(
            f"{path} has {len(ids):,} tokens, fewer than {sequences} x {length}: use more text, or lower "
            "--calibration-sequences or --calibration-length"
        )


def load_tokenizer(folder: Path):
    """Return the tokenizer of a model folder.

    Raises:
        PVQError: there is none that loads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PVQError(
            f"{folder} has no tokenizer that transformers can load: copy tokenizer.json into it"
        ) from error


def tokenize(folder: Path, text_file: str | Path) -> torch.Tensor:
    """Return the token ids of the whole text, int64 [n], without special tokens.

    Raises:
        PVQError: the folder has no tokenizer that loads, or the file is not a UTF-8 text.
    """
    try:
        text = Path(text_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PVQError(f"{text_file} cannot be read as a UTF-8 text ({error}): name another file") from error
    return _encode(load_tokenizer(folder), text)


def _encode(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
    )


def tokens_digest(token_ids: torch.Tensor) -> str:
    """Return the SHA-256 of the token ids and their shape, for the fingerprint of a run."""
    content = str(list(token_ids.shape)).encode() + token_ids.numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


# ---- tables: parquet, jsonl, and the arrow files of datasets.save_to_disk ---------------------------------


def table_files(path: Path) -> list[Path]:
    """Return the table itself, or the tables of a folder: those that state.json lists, or else all, by name.

    Raises:
        PVQError: there is none, or the folder holds several splits.
    """
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise PVQError(f"{path} holds the splits {', '.join(splits)}: name one of these folders")
    if (path / "state.json").exists():
        listed = json.loads((path / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [path / entry["filename"] for entry in listed]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TABLES)
    if not files:
        raise PVQError(
            f"--calibration {path}: no .parquet, .jsonl or .arrow file is in this folder: name a text, or the "
            "folder of a dataset"
        )
    splits = {split for file in files for split in _splits_named(file.relative_to(path))}
    if len(splits) > 1:
        raise PVQError(
            f"{path} holds files of the splits {', '.join(sorted(splits))}: name the file of one split, or a folder "
            "that holds no other"
        )
    return files


def _splits_named(file: Path) -> set[str]:
    """Return the splits that a path names in a word of its own, as 'train' in data/train_sft-00000-of-00003.parquet."""
    words = set(re.findall(r"[a-z]+", str(file.with_suffix("")).lower()))
    return {split for split, names in SPLITS.items() if words & names}


def _rows(file: Path) -> Iterator[tuple[str, str | list]]:
    """Yield each row's text, or its messages (a list of dicts), behind the words that say where it is; one batch of
    rows is in memory at a time. A row whose text is null, or whose messages are null or none, is left out.

    Raises:
        PVQError: the file is damaged, has neither column or other values in it, or pyarrow is needed and not
            installed.
    """
    is_json = file.suffix.lower() == ".jsonl"
    for number, row in _json_rows(file) if is_json else enumerate(_arrow_rows(file), 1):
        where = f"{file}, {'line' if is_json else 'row'} {number}"
        text, messages = row.get("text"), row.get("messages")
        if isinstance(text, str):
            yield where, text
        elif isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            if messages:
                yield where, messages
        elif text is not None or messages is not None:
            raise PVQError(
                f"{where}: 'text' must be a string, or 'messages' a list of role and content: repair the row"
            )
        elif "text" not in row and "messages" not in row:
            raise PVQError(
                f"{where} has the columns {', '.join(sorted(row))} and needs 'text' (strings) or 'messages' "
                "(lists of role and content): rename one"
            )


def _json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """Yield the number of each line that is not empty, and what is in it."""
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise PVQError(f"{file}, line {number}: not a JSON object: repair the file")
                    yield number, row
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PVQError(f"{file} cannot be read as JSON lines ({error}): name another file") from error


def _arrow_rows(file: Path) -> Iterator[dict]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PVQError(
            f"{file} needs the package pyarrow: pip install pyarrow, or convert it to .jsonl"
        ) from error
    try:
        if file.suffix.lower() == ".parquet":
            table = pyarrow.parquet.ParquetFile(file)
            columns = [name for name in table.schema_arrow.names if name in ("text", "messages")]
            for batch in table.iter_batches(256, columns=columns or None):
                yield from batch.to_pylist()
        else:
            with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
                for batch in stream:
                    yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise PVQError(f"{file} cannot be read ({error}): copy it again, or name another file") from error


def _tokens_of_documents(files: list[Path], total: int, wanted: int, tokenizer) -> torch.Tensor:
    """Return the tokens of ``wanted`` of ``total`` documents, evenly spaced, each ended by the end token."""
    chosen = {index * total // wanted for index in range(wanted)}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = []
    for index, (where, row) in enumerate(row for file in files for row in _rows(file)):
        if index not in chosen:
            continue
        if isinstance(row, list):
            row = _chat(tokenizer, row, where)
        pieces += [_encode(tokenizer, row), torch.tensor(end, dtype=torch.int64)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _chat(tokenizer, messages: list, where: str) -> str:
    if tokenizer.chat_template is None:
        raise PVQError(
            f"{tokenizer.name_or_path} has no chat template for the column 'messages': use a column 'text'"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program: it may refuse a role, or trip over what is missing
        raise PVQError(
            f"{where}: the chat template of {tokenizer.name_or_path} does not take these messages ({error}): "
            "remove the row, or use a column 'text'"
        ) from error
