"""What tells one model, tokenizer and data file from another."""

from cbtrain.model import identity


def test_a_large_file_is_told_by_samples_that_reach_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_SAMPLED_ABOVE", 1000)
    monkeypatch.setattr(identity, "_SAMPLE_BYTES", 100)
    file = tmp_path / "model.safetensors"
    content = bytes(range(256)) * 100
    told = set()
    for changed in (content, content[:-1] + b"x", b"x" + content[1:], content + b"x"):
        file.write_bytes(changed)
        told.add(identity.sampled_checksum(file))
    assert len(told) == 4
