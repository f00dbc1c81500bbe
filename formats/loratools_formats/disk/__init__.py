"""Files on disk: safe opening, whole outputs, provenance, strict JSON and YAML, errors."""
