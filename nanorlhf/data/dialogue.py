"""The YAML subset of conversation files: a list of lists of plain, quoted or literal block strings."""


def parse_conversations(text):
    """Conversations, each a list of turns, from a file of the form::

        conversations:
        - - First turn
          - Second turn, which may
            go on here
        - - 'quoted' or "quoted"
          - |
            a literal block

    >>> parse_conversations("conversations:\\n- - Hi\\n  - 'It''s\\n    me'\\n- - A\\n  - |\\n    x\\n      y\\n")
    [['Hi', "It's me"], ['A', 'x\\n  y']]
    """
    conversations, turn, started = [], None, False
    for line in text.splitlines():
        if not started:
            started = line.strip() == "conversations:"
            continue
        body = line.lstrip(" ")
        indent = len(line) - len(body)
        opens = _opening(line)
        inside_block = turn is not None and turn[0].strip() in ("|", "|-", ">", ">-") and indent > 2
        if opens and not inside_block:
            new, rest = opens
            if new or not conversations:
                conversations.append([])
            turn = [rest]
            conversations[-1].append(turn)
        elif turn is not None and (inside_block or not body or not body.startswith("#")):
            turn.append(line)
    parsed = [[_scalar(turn) for turn in turns] for turns in conversations]
    return [[turn.strip() for turn in turns if turn.strip()] for turns in parsed if any(turns)]


def _opening(line):
    """(whether a conversation starts here, the rest of the line) for a line that opens a turn, else None."""
    stripped = line.rstrip() + " "  # a dash alone opens a turn without text
    for mark, new in (("- - ", True), ("  - ", False), ("- ", True)):
        if stripped.startswith(mark):
            rest = stripped[len(mark):].lstrip()
            return (new, rest[2:] if mark == "- " and rest.startswith("- ") else rest)
    return None


def _scalar(lines):
    head = lines[0].strip()
    if head in ("|", "|-", ">", ">-"):
        body = lines[1:]
        margin = min((len(line) - len(line.lstrip()) for line in body if line.strip()), default=0)
        text = "\n".join(line[margin:].rstrip() for line in body).strip("\n")
        return " ".join(text.split()) if head.startswith(">") else text
    text = " ".join(part.strip() for part in lines if part.strip())
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('\\"', '"').replace("\\n", "\n").replace("\\\\", "\\")
    return text
