"""A page on which checkpoints say what is in photographs: `models.py`, what they answer; `page.py`; `server.py`."""
