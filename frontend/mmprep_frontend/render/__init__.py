"""From a request's bytes to an engine-ready answer: schemas, conversation, template, tokens, expansion, answer.

All of it is blocking code without sockets, files (after start) or clocks; the service calls it on an executor thread.
The order of a chat request: :mod:`.requests` parses, :mod:`.conversation` takes the media out, :mod:`.template` renders
the text, :mod:`.tokens` encodes it, :mod:`.expansion` puts each medium's ids in, :mod:`.answer` builds the answer.
"""
