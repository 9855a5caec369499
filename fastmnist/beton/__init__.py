"""The `.beton` file: format, layout, writer, reader."""
