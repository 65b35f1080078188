"""The engine: many requests at once over one model. Its face is `engine.Engine` with `request.Request`."""
