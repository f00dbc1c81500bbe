"""A validator of the part of JSON Schema that our schemas use, written from the specification."""

_TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "integer": int, "number": (int, float),
}  # fmt: skip
_KNOWN = {
    "$schema", "title", "description", "type", "properties", "required", "additionalProperties",
    "items", "prefixItems", "minItems", "anyOf", "oneOf", "enum", "const",
}  # fmt: skip


def faults(value, schema, place="$"):  # noqa: C901 - one branch for each keyword
    """Return what of a value a schema does not allow, each with its place."""
    unknown = set(schema) - _KNOWN
    assert not unknown, unknown
    found = []
    for word, enough in (("anyOf", lambda n: n >= 1), ("oneOf", lambda n: n == 1)):
        if word in schema:
            each = [faults(value, shape, place) for shape in schema[word]]
            if not enough(sum(not one for one in each)):
                found += min(each, key=len) or [f"{place}: fits several shapes"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{place}: {value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place}: {value!r} is none of {schema['enum']}")
    wanted = schema.get("type")
    if wanted is not None and not _is(value, wanted):
        return [*found, f"{place}: {value!r} is no {wanted}"]
    if isinstance(value, dict):
        found += _of_object(value, schema, place)
    if isinstance(value, list):
        shapes = schema.get("prefixItems", [])
        rest = schema.get("items", {})
        for index, item in enumerate(value):
            shape = shapes[index] if index < len(shapes) else rest
            here = f"{place}[{index}]"
            found += [f"{here}: too many"] if shape is False else faults(item, shape, here)
        if len(value) < schema.get("minItems", 0):
            found.append(f"{place}: too few items")
    return found


def _is(value, wanted):
    if isinstance(value, bool):
        return wanted == "boolean"
    return isinstance(value, _TYPES[wanted])


def _of_object(value, schema, place):
    known = schema.get("properties", {})
    found = [f"{place}: lacks {name}" for name in schema.get("required", []) if name not in value]
    for name, item in value.items():
        shape = known.get(name, schema.get("additionalProperties", {}))
        here = f"{place}.{name}"
        found += [f"{here}: unknown"] if shape is False else faults(item, shape, here)
    return found
