"""What is wrong with some instances, by the schemas in some documents.

Reads from standard input, in one line: {"documents": {NAME: DOCUMENT}, "instances": [{"name", "document",
"pointer", "instance"}]}. The pointer leads to a schema in the document. Writes a list of complaints.
"""

import json
import sys

from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

task = json.loads(sys.stdin.readline())
registry = Registry().with_resources(
    (f"urn:{name}", DRAFT202012.create_resource(document)) for name, document in task["documents"].items()
)
complaints = []
for it in task["instances"]:
    schema = {"$ref": f"urn:{it['document']}#{it['pointer']}"}
    validator = Draft202012Validator(schema, registry=registry, format_checker=Draft202012Validator.FORMAT_CHECKER)
    complaints += [f"{it['name']}: {error.json_path}: {error.message}" for error in validator.iter_errors(it["instance"])]
print(json.dumps(complaints))
