// What the official parser has against an AsyncAPI document, a line for each complaint.
//
//   node asyncapi.mjs FOLDER-WITH-THE-PARSER DOCUMENT

import { createRequire } from "node:module";

const [folder, file] = process.argv.slice(2);
const { Parser, fromFile } = createRequire(`${folder}/`)("@asyncapi/parser");

const { document, diagnostics } = await fromFile(new Parser(), file).parse();
// Errors and warnings. Below these are hints, such as that there is a newer version of AsyncAPI.
const complaints = diagnostics.filter(({ severity }) => severity <= 1);
for (const { path, message } of complaints) console.log(`${path.join(".")}: ${message}`);
if (!document && complaints.length === 0) console.log("the parser gave no document, and no reason");
