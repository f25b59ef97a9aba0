"""One class per kind of object, each a thin, typed face of its part of the REST API."""
