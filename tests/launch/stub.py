"""Stands for gcloud, kubectl, srun, …: records what it was given and plays back answers.

$STUBS/calls gets one JSON list a call: the program's name and its arguments. $STUBS/answers is a
list of [pattern, [[output, code], …]]: the first whose pattern is found in the call's words answers
it, with its outputs one after the other, the last for ever. Of a code that is not 0 the output is
an error message.
"""

import json
import os
import pathlib
import re
import sys

folder = pathlib.Path(os.environ["STUBS"])
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(folder / "calls", "a") as file:
    file.write(json.dumps(call) + "\n")
text, code = "", 0
answers = json.loads((folder / "answers").read_text())
for pattern, outputs in answers:
    if re.search(pattern, " ".join(call)):
        text, code = outputs[0]
        del outputs[: len(outputs) > 1]
        (folder / "answers").write_text(json.dumps(answers))
        break
print(text, file=sys.stderr if code else sys.stdout)
sys.exit(code)
