"""The frontend process: HTTP and native endpoints, rendering, media and expansion."""
