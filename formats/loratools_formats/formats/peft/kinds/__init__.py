"""PEFT's adapter kinds other than LoRA: their declarations, table, settings and reader."""
