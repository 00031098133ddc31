"""The demonstration: a service on the embedded model, one chat with two photographs, and a backend that reads the result.

``python -m mmprep.demo`` starts the service, and beside it a second process in the role of an engine. The chat is sent over
HTTP twice; the backend process gets nothing but the addresses of the answer, reads the tensors where they lie, and compares
them with what transformers' own processor makes of the same files. Every statement that is printed was checked.
"""
