"""Names of the files beside an adapter that belong to it: its tokenizer, card and licence."""

ATTACHMENTS = (
    "added_tokens.json", "bpe.codes", "chat_template.jinja", "chat_template.json", "merges.txt",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "sentencepiece.bpe.model", "source.spm", "special_tokens_map.json", "spiece.model",
    "target.spm", "tekken.json", "tiktoken.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
    "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "README.md", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json",
)  # fmt: skip
