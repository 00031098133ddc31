"""The HTTP edge: routes, errors, the server and the text form of the metrics. It renders nothing itself."""
