"""Bridges to engines: each takes what the service prepares into the forms of one engine, and imports it only when used."""
