"""The compiled file: format, reader, writer."""
