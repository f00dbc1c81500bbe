"""The GGUF container: headers, element types, split models and model layouts."""
