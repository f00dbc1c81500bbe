"""Public functions run by name: what a recipe says, and what a statement records."""
