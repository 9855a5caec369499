"""What a figure needs beside it: where and with what it was measured."""
