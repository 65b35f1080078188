"""What a request demands of its answer's form, as a constraint of the engine."""

from __future__ import annotations

from fastapi.concurrency import run_in_threadpool

from gemwright.engine.structured import Constraint, Grammars
from gemwright.serve.errors import ApiError, invalid
from gemwright.serve.schema import Controls


def constraint(body: Controls) -> Constraint | None:
    """The constraint of response_format or of a guided_ field. ValueError names the field."""
    form = body.response_format
    if form is not None and form.json_schema is not None:
        return Constraint.of("json_schema", form.json_schema.schema_, field="response_format.json_schema.schema")
    if form is not None and form.type == "json_object":
        return Constraint.of("json_object", "", field="response_format")
    if body.guided_json is not None:
        return Constraint.of("json_schema", body.guided_json, field="guided_json")
    if body.guided_regex is not None:
        return Constraint.of("regex", body.guided_regex, field="guided_regex")
    if body.guided_choice is not None:
        return Constraint.of("choice", body.guided_choice, field="guided_choice")
    if body.guided_grammar is not None:
        return Constraint.of("grammar", body.guided_grammar, field="guided_grammar")
    return None


async def compiled(grammars: Grammars, wanted: Constraint | None) -> None:
    """Compile in a thread, so that the engine finds the grammar made. ApiError 400 where it cannot be met."""
    if wanted is not None:
        try:
            await run_in_threadpool(grammars.compile, wanted)
        except ValueError as error:
            found = invalid(error)
            if found.param is None:  # from a library below, which knows no field
                said = f"{wanted.field}: {error}"
                found = ApiError(400, said, param=wanted.field, code="invalid_value")
            raise found from error
