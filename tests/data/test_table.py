"""Files that cannot be read, each with a line that says what is wrong."""

import bz2
import gzip
import json
import lzma
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedp2eft.data.table import read_columns, read_table
from fedp2eft.errors import UserError

ROWS = [{"text": f"texte numéro {n}", "label": "ab"[n % 2]} for n in range(200)]


def lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(path, message, **arguments):
    arguments = {"text_columns": ("text",), "columns": ("label",), **arguments}
    before = sorted(path.parent.iterdir())
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_columns(path, **arguments)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert sorted(path.parent.iterdir()) == before


def test_all_kinds_hold_the_same(file, tmp_path):
    table = "text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in ROWS)
    kinds = {
        "a.jsonl": lines(),
        "a.json": b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n\r\n"),
        "a.JSONL.gz": gzip.compress(lines()),
        "a.csv": table.encode(),
        "a.csv.gz": gzip.compress(table.encode()),
        "a.parquet": parquet(tmp_path / "b.parquet"),
    }
    for name, content in kinds.items():
        read = read_table(file(name, content), text_columns=("text",))
        assert read.to_list() == ROWS, name
        assert read.cache_files == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kinds, "b.parquet"])


def test_keeps_what_is_asked_for(file):
    path = file("a.jsonl", lines([{**row, "split": "train", "id": 1} for row in ROWS]))
    assert read_table(path).column_names == ["text", "label", "split", "id"]
    read = read_columns(path, text_columns=("text",), columns=(), optional=("split", "pool"))
    assert list(read.columns) == ["text", "split"]


def test_line_separators_within_a_text_are_text(file):
    rows = [{"text": "eins\u2028zwei\x85drei\nvier", "label": "a"}]
    assert read_table(file("a.jsonl", lines(rows)))["text"][:] == [rows[0]["text"]]


def test_quoted_csv_fields_hold_commas_and_breaks(file):
    path = file("a.csv", b'text,label\r\n"one, two\nthree ""four""",a\r\n\r\n')
    assert read_table(path)["text"][:] == ['one, two\nthree "four"']


def test_missing_file(tmp_path):
    refused(tmp_path / "a.jsonl", "does not exist")


def test_directory(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    refused(tmp_path / "a.jsonl", "is a directory")


def test_unknown_ending(file):
    refused(file("a.xlsx", b"x"), "has no known ending: name it .jsonl")
    refused(file("a.parquet.gz", b"x"), "has no known ending")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "b.csv.gz"])
def test_empty_file(file, name):
    refused(file(name, b""), "is empty")


def test_gzip_of_nothing(file):
    refused(file("a.jsonl.gz", gzip.compress(b"\n")), "is empty")


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff\x00\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_of_a_byte_order_mark_alone_is_empty(file, name, mark):
    refused(file(name, mark), "is empty")


def test_no_rows(file, tmp_path):
    refused(file("a.csv", b"text,label\n"), "has no rows")
    schema = pa.schema([("text", pa.string()), ("label", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "has no rows")


def test_truncated_json(file):
    refused(file("a.jsonl", lines()[:-8]), "line 200: not a JSON object (Unterminated string")
    refused(file("b.jsonl", lines()[:-8]), "looks cut off")


def test_broken_json_line(file):
    refused(file("a.jsonl", b'{"text": "a", "label": "b"}\n{text}\n{}\n'), "line 2: not a JSON")
    deep = b"[" * 200_000
    refused(file("b.jsonl", deep), "starts like a JSON list but is not complete")


def test_json_that_is_no_object(file):
    refused(file("a.json", b'[{"text": "a"}, 3]\n'), "row 2: a JSON int, not an object")
    refused(file("b.json", b'"text"'), "line 1: a JSON str, not an object")


def test_truncated_gzip(file):
    refused(file("a.jsonl.gz", gzip.compress(lines())[:-20]), "is cut off")


def test_broken_gzip(file):
    refused(file("a.jsonl.gz", lines()), "is not a valid gz file")
    content = bytearray(gzip.compress(lines()))
    content[40:60] = b"\xff" * 20
    refused(file("b.jsonl.gz", bytes(content)), "is not a valid gz file")


def test_truncated_parquet(file, tmp_path):
    content = parquet(tmp_path / "whole.parquet")
    for cut in (3, 100, len(content) - 10):
        refused(file("a.parquet", content[:cut]), "is not a complete Parquet file")


def test_truncated_csv(file):
    refused(
        file("a.csv", b'text,label\n"a",b\n"c'),
        "line 3: a quotation mark that opens here is not closed, or the file is cut",
    )
    refused(file("b.csv", b"text,label\na,b\nc\n"), "line 3: 1 fields where the header names 2")


def test_csv_with_a_bare_comma(file):
    refused(file("a.csv", b"text,label\na, b,c\n"), "line 2: 3 fields where the header names 2")


def test_csv_with_a_repeated_column(file):
    refused(file("a.csv", b"text,label,text\na,b,c\n"), "two columns have the same name")


@pytest.mark.parametrize(("name", "line"), [("a.jsonl", 2), ("a.csv", 2)])
def test_not_utf_8(file, name, line):
    content = b'{"text": "a", "label": "b"}\n{"text": "caf\xe9", "label": "b"}\n'
    refused(file(name, content), f"is not UTF-8: byte 0xe9 in line {line} (byte 41 of the file)")


def test_missing_column(file, tmp_path):
    message = "has no column 'text'. Did you mean 'txt'? It has txt, label."
    rows = [{"txt": "a", "label": "b"}]
    refused(file("a.jsonl", lines(rows)), message)
    refused(file("a.csv", b"txt,label\na,b\n"), message)
    parquet(tmp_path / "a.parquet", rows)
    refused(tmp_path / "a.parquet", message)


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, "nothing"), (3, "int '3'"), (["a"], "list \"['a']\""), (" \n", "blank text")],
)
def test_text_that_is_none(file, value, found):
    rows = [*ROWS[:2], {"text": value, "label": "a"}]
    refused(file("a.jsonl", lines(rows)), f"line 3: column 'text' holds {found}, not text")


def test_row_without_text(file, tmp_path):
    refused(file("a.jsonl", lines([*ROWS[:2], {"label": "a"}])), "line 3: column 'text' holds")
    refused(file("a.csv", b"text,label\n,a\n"), "line 2: column 'text' holds blank text")
    parquet(tmp_path / "a.parquet", [{"text": b"\x00\x01", "label": "a"}])
    refused(tmp_path / "a.parquet", "row 1: column 'text' holds bytes")


def test_mixed_column(file):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "c"}]
    with pytest.raises(UserError, match="column 'label' mixes kinds of values"):
        read_table(file("a.jsonl", lines(rows)))


def test_half_a_surrogate(file):
    refused(
        file("a.jsonl", b'{"text": "\\ud800", "label": "a"}'),
        "line 1: column 'text' holds half a character",
    )


def read(path, **options):
    return read_columns(path, **({"text_columns": ("text",), "columns": ("label",)} | options))


LONG = "long " * 32_000


@pytest.mark.parametrize(
    ("name", "content", "texts", "form"),
    [
        ("a.tsv", "text\tlabel\nun\ta\ndeux\tb\n", ["un", "deux"], "tab-separated"),
        ("a.csv", "text\tlabel\nun\ta\n", ["un"], "tab-separated"),
        ("a.csv", "text;label\nun, deux;a\n", ["un, deux"], "semicolon-separated"),
        ("a.csv", "sep=;\r\ntext;label\r\nun;a\r\n", ["un"], "semicolon-separated"),
        ("a.csv", "id;text;label;score\n1;un;a;1,5\n", ["un"], "semicolon-separated"),
        ("a.csv", "text|label\nun|a\n", ["un"], "pipe-separated"),
        ("a.tsv", "text,label\nun,a\n", ["un"], "comma-separated"),
        ("a.csv", "text,label,,\nun,a,,\ndeux,b\n,,,\n", ["un", "deux"], "comma-separated"),
        ("a.csv", ",text,label\n0,un,a\n1,deux,b\n", ["un", "deux"], "comma-separated"),
        ("a.csv", "text,label\runo,a\rdue,b\r", ["uno", "due"], "comma-separated"),
        ("a.tsv", "text\tlabel\runo\ta\r", ["uno"], "tab-separated"),
        ("a.csv", "\ufefftext, label\nun, a\n", ["un"], "comma-separated"),
        ("a.csv", f'text,label\n"{LONG}",a\n', [LONG], "comma-separated, quoted"),
        # the authors' own TSVs: quoted as CSV is, and not quoted at all
        ("a.tsv", 'text\tlabel\n"a ""b"""\tx\n', ['a "b"'], "tab-separated, quoted"),
        ("a.tsv", 'text\tlabel\n"a\nb\tc"\tx\n', ["a\nb\tc"], "tab-separated, quoted"),
        ("a.tsv", '"text"\t"label"\n"a"\t"x"\n"b"\t"y"\n', ["a", "b"], "tab-separated, quoted"),
        ("a.tsv", 'text\tlabel\n""so\tx\n', ['""so'], "tab-separated, not quoted"),
        ("a.tsv", 'text\tlabel\n"a" b\tx\n', ['"a" b'], "tab-separated, not quoted"),
        ("a.tsv", 'text\tlabel\n"a\tx\nb"\ty\n', ['"a', 'b"'], "tab-separated, not quoted"),
        ("a.tsv", 'text\tlabel\n"a"\tx\nb\ty\n', ['"a"', "b"], "tab-separated, not quoted"),
    ],
)
def test_delimiters_and_quoting_are_found(file, name, content, texts, form):
    table = read(file(name, content.encode()))
    assert table.columns["text"] == texts
    assert table.form == form


def test_lines_are_counted_as_an_editor_counts_them(file):
    path = file("a.csv", b'sep=,\ntext,label\n"a\nb",x\n\n,y\n')
    refused(path, "line 6: column 'text' holds blank text")
    refused(
        file("b.csv", b'text,label\na,x\n"b" c,y\n'), "line 3: a quotation mark within a quoted"
    )
    refused(file("c.csv", b"text,label,,\na,b,c,\n"), "line 2: 4 fields where the header names 2")
    refused(file("d.tsv", b"text\tlabel\na\tb\tc\n"), "Quote a field that holds a tab")


def test_unused_columns_may_have_one_name(file):
    path = file("a.csv", b"text,label,x,x\na,b,1,2\n")
    assert read(path).columns == {"text": ["a"], "label": ["b"]}


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_text(file, pack):
    ending = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[pack]
    packed = pack(b"text\tlabel\nun\ta\n")
    assert read(file(f"a.tsv.{ending}", packed)).columns["text"] == ["un"]
    refused(file(f"b.tsv.{ending}", packed[:-8]), "b.tsv")
    refused(file("c.tsv", packed), f"give it the ending .{ending} as well")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 text", "a ZIP archive or an Excel workbook: unpack it, or save it as CSV"),
        (b"PAR1 text", "a Parquet file: give it the ending .parquet"),
        (b"\x28\xb5\x2f\xfd text", "packed with zstd"),
    ],
)
def test_a_file_under_another_ending_is_named(file, content, message):
    refused(file("a.csv", content), f"a.csv is {message}")


def test_utf_16_with_its_mark(file):
    content = "text\tlabel\nдва\ta\n"
    for code in ("utf-16-le", "utf-16-be"):
        mark = "\ufeff".encode(code)
        assert read(file("a.tsv", mark + content.encode(code))).columns["text"] == ["два"]


def test_a_folder_of_parquet(tmp_path):
    (tmp_path / "rows").mkdir()
    for shard, rows in ((0, ROWS[:3]), (1, ROWS[3:5])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows" / f"{shard}.parquet")
    assert read_table(tmp_path / "rows").to_list() == ROWS[:5]


def test_a_json_list(file):
    pretty = json.dumps(ROWS, indent=1).encode()
    assert read_table(file("a.json", pretty)).to_list() == ROWS
    refused(file("b.json", pretty[:-9]), "starts like a JSON list but is not complete")
    columns = json.dumps({"text": ["a", "b"], "label": ["x", "y"]})
    refused(file("c.json", columns.encode()), "one object of columns, not rows")
    refused(file("d.json", json.dumps(ROWS[0], indent=1).encode()), "one object over several lines")


def test_the_home_folder(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file("a.jsonl", lines())
    assert len(read_table("~/a.jsonl")) == len(ROWS)


def test_names_of_columns_are_compared_as_they_read(file):
    path = file("a.csv", "cate\u0301gorie ,text\na,b\n".encode())
    assert read(path, columns=("catégorie",)).columns == {"text": ["b"], "catégorie": ["a"]}
