import io
import os
import sys

import pytest

from utils.errors import UserError, printable, user_facing


@pytest.mark.parametrize(
    'name, text',
    [
        (b'plain name.jpg', 'plain name.jpg'),
        ('Hände \u6307 \U0001f590'.encode(), 'Hände \u6307 \U0001f590'),
        (b'H\xe4nde', r'H\xe4nde'),
        (b'a\nb\x1b[31m', r'a\nb\x1b[31m'),
        ('\u202egpj.exe'.encode(), r'\u202egpj.exe'),
    ],
)
def test_a_file_name_is_printed_as_one_line_of_valid_text(name, text):
    assert printable(os.fsdecode(name)) == text
    printable(os.fsdecode(name)).encode()


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_text_that_cannot_be_encoded_is_printed_as_escapes(monkeypatch, encoding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, 'strict') for name in ('stdout', 'stderr')}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    @user_facing
    def main():
        print('H\udce4nde')
        raise UserError('H\udce4nde \u6307')

    assert main() == 2
    printed = {name: (stream.flush(), stream.buffer.getvalue().decode(encoding))[1] for name, stream in streams.items()}
    assert printed['stdout'] == 'H\\udce4nde\n'
    assert printed['stderr'] == 'error: H\\udce4nde ' + ('\\u6307' if encoding == 'ascii' else '\u6307') + '\n'
