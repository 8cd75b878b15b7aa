"""Architectures that have something in common, by their names in GGUF files: said once, for all tables of architectures."""

from __future__ import annotations

HYBRID = (  # recurrent layers beside attention
    "bailingmoe3 falcon-h1 granitehybrid jamba kimi-k3 kimi-linear lfm2 lfm2moe minimax-01 nemotron_h nemotron_h_moe "
    "plamo2 qwen35 qwen35moe qwen3next"
)
RECURRENT = "arwkv7 mamba mamba2 rwkv6 rwkv6qwen2 rwkv7"
LATENT = "deepseek2 deepseek2-ocr mistral4"  # MLA in all layers
LATENT_HYBRID = "bailingmoe3 kimi-k3 kimi-linear"
SPARSE = "deepseek32 deepseek4 dots3note glm-dsa glm5-next hy_v4 minimax-m3 qwen4exp"  # with an indexer of their own
SINKS = "gpt-oss granite_swa mimo2"
SHARED = "gemma3n gemma4"  # some layers read the cache of others
ALIBI = "bloom jais mpt refact"
DRAFT = "dflash eagle3 gemma4-assistant"
DIFFUSION = "dream llada llada-moe rnd1"
BUCKETS = "t5 t5encoder"  # relative position buckets
EMBEDDING = "llama-embed"
ENCODERS = "bert eurobert gemma-embedding jina-bert-v2 jina-bert-v3 modern-bert neo-bert nomic-bert nomic-bert-moe"
