"""What takes the place of the models that llama.cpp's server tests download, laid out as the server's own download cache is.

Models of text are the demo model, with the tokens that a test wants. Embeddings and rankings come from a random BERT: it has all of the
interface and none of the sense.
"""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np

from tiny.gguf_copy import copy_model

COMMIT = "0" * 40
FILL_IN = {"fim_pre": 11, "fim_suf": 12, "fim_mid": 13, "fim_rep": 3, "fim_sep": 5}  # tokens that the demo model has for notebooks
WORDS = "believe the meaning of life is this test hello".split()
PRESET = """\
[tinygemma3-preset]
hf-repo = ggml-org/tinygemma3-GGUF:Q8_0
[stories260K-test]
hf-repo = ggml-org/test-model-stories260K:F32
"""


def fill_cache(cache: Path, model: Path) -> Path:
    """Fills `cache` with a stand-in for every repository that tests which are not slow name; returns it."""
    for repository, name in (
        ("test-model-stories260K", "stories260K-F32.gguf"),
        ("stories15M_MOE", "stories15M_MOE-F16.gguf"),
        ("tinygemma3-GGUF", "tinygemma3-Q8_0.gguf"),
    ):
        _place(cache, repository, name).symlink_to(model)
    write_fill_in_model(_place(cache, "test-model-stories260K-infill", "stories260K-infill-F32.gguf"), model)
    write_bert(_place(cache, "models", "bert-bge-small/ggml-model-f16.gguf"))
    write_bert(_place(cache, "models", "jina-reranker-v1-tiny-en/ggml-model-f16.gguf"), ranking=True)
    write_split(_place(cache, "models", "tinyllamas/split/stories15M-q8_0.gguf"), model)
    _place(cache, "test-preset-ci", "preset.ini").write_text(PRESET, encoding="utf-8")
    return cache


def place_downloads(folder: Path, model: Path) -> None:
    """What tests fetch by themselves, into `folder`, unless it is there."""
    folder.mkdir(exist_ok=True)
    (folder / "stories15M-q4_0.gguf").symlink_to(model)  # drafts


def _place(cache: Path, repository: str, name: str) -> Path:
    """The path of a file of a repository in the cache, its folders made."""
    root = cache / f"models--ggml-org--{repository}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    path = root / "snapshots" / COMMIT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_fill_in_model(target: Path, model: Path) -> None:
    """The model, with tokens for filling in the middle of a text."""
    copy_model(model, target, metadata={f"tokenizer.ggml.{name}_token_id": np.uint32(i) for name, i in FILL_IN.items()})


def write_split(target: Path, model: Path) -> None:
    """The model in three files, named like `target` and their number."""
    reader = gguf.GGUFReader(model)
    size = -(-len(reader.tensors) // 3)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents(), split_max_tensors=size)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_bert(target: Path, *, ranking: bool = False, n_embd: int = 64, n_layer: int = 2, n_ctx: int = 512) -> None:
    """A random encoder whose vocabulary is letters and a few words that tests count; with `ranking` it has a head that gives a text one number."""
    draw = np.random.default_rng(0)
    letters = [chr(c) for c in range(33, 127)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *("\u2581" + c for c in [*letters, *WORDS]), *letters]
    writer = gguf.GGUFWriter(target, "bert")
    writer.add_block_count(n_layer)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(2 * n_embd)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK if ranking else gguf.PoolingType.CLS)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * (len(tokens) - 5))
    writer.add_token_type_count(2)
    for i, name in enumerate(("pad", "unk", "bos", "sep", "mask")): # the first token is [CLS]
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_eos_token_id(3)

    def matrix(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", (draw.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32))
        if len(shape) == 2 and not re.search("embd|types", name):
            writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(n_embd, np.float32))

    matrix("token_embd", len(tokens), n_embd)
    matrix("position_embd", n_ctx, n_embd)
    matrix("token_types", 2, n_embd)
    norm("token_embd_norm")
    for i in range(n_layer):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{name}", n_embd, n_embd)
        matrix(f"blk.{i}.ffn_up", 2 * n_embd, n_embd)
        matrix(f"blk.{i}.ffn_down", n_embd, 2 * n_embd)
        norm(f"blk.{i}.attn_output_norm")
        norm(f"blk.{i}.layer_output_norm")
    if ranking:
        matrix("cls", n_embd, n_embd)
        matrix("cls.output", 1, n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

