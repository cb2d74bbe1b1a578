# SPDX-License-Identifier: Apache-2.0
import asyncio
import os

import pytest

from server import keys
from server.errors import ServerError
from server.keys import KeyStore, read_keys


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# for tests\n\nalice sk-alice\nsk-nobody\n")
    path.chmod(0o600)
    return path


def test_keys_have_the_names_that_the_file_gives_them(key_file):
    store = KeyStore(["fixed"], key_file)
    assert len(store) == 3
    assert store.name_of("Bearer sk-alice") == "alice"
    assert store.name_of("bearer sk-nobody") == "line 4"
    assert store.name_of("Bearer fixed") == "key"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Basic sk-alice", "sk-alice", "Bearer alice", "Bearer \udcff"],
)
def test_anything_else_is_no_key(key_file, header):
    assert KeyStore([], key_file).name_of(header) is None


def test_every_key_is_compared_whichever_matches(key_file, monkeypatch):
    compared = []
    real = keys.secrets.compare_digest
    monkeypatch.setattr(keys.secrets, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    store = KeyStore(["first", "second"], key_file)
    for header in ("Bearer first", "Bearer sk-nobody", "Bearer wrong"):
        compared.clear()
        store.name_of(header)
        assert len(compared) == 4


def test_a_reloaded_file_adds_and_revokes(key_file):
    store = KeyStore(["fixed"], key_file)
    key_file.write_text("bob sk-bob\n")
    store.reload()
    names = [store.name_of(f"Bearer {key}") for key in ("sk-alice", "sk-bob", "fixed")]
    assert names == [None, "bob", "key"]


def test_a_file_that_cannot_be_used_leaves_the_keys(key_file, caplog):
    store = KeyStore([], key_file)
    key_file.write_text("a b c\n")
    store.reload()
    assert store.name_of("Bearer sk-alice") == "alice" and "line 1 has 3 words" in caplog.text
    key_file.unlink()
    store.reload()
    assert store.name_of("Bearer sk-alice") == "alice"


def test_a_change_of_the_file_is_found_without_a_signal(key_file, monkeypatch):
    monkeypatch.setattr(keys, "_CHECK_INTERVAL_S", 0.01)
    store = KeyStore([], key_file)

    async def change_and_wait():
        watch = asyncio.create_task(store.watch())
        replacement = key_file.with_suffix(".new")  # as an editor or a mounted secret does it
        replacement.write_text("bob sk-bobby\n")
        os.replace(replacement, key_file)
        for _ in range(200):
            await asyncio.sleep(0.01)
            if store.name_of("Bearer sk-bobby"):
                break
        watch.cancel()

    asyncio.run(change_and_wait())
    assert store.name_of("Bearer sk-bobby") == "bob" and store.name_of("Bearer sk-alice") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a secret1\na secret2\n", "line 2 uses the name a again"),
        ("# nothing\n", "holds no key"),
        ("one two secret3\n", "line 1 has 3 words"),
    ],
)
def test_a_mistake_is_named_without_showing_a_key(tmp_path, text, message):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ServerError, match=message) as error:
        read_keys(path)
    assert "secret" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ServerError, match=r"--api-key-file .*nosuch cannot be read"):
        KeyStore([], tmp_path / "nosuch")


def test_a_file_that_others_can_read_is_warned_about(key_file, caplog):
    key_file.chmod(0o644)
    KeyStore([], key_file)
    assert "chmod 600" in caplog.text
