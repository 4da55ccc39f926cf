// OpenAI's package of npm asks a server: `node node_client.mjs PACKAGE/index.mjs URL MODEL`. What is asked comes as JSON on standard
// input (messages, tools, schema); what was found goes as JSON to standard output.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [path, baseURL, model] = process.argv.slice(2);
const { default: OpenAI, NotFoundError, BadRequestError } = await import(pathToFileURL(path).href);
const { messages, tools, schema } = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const greedy = { model, messages, temperature: 0, max_tokens: 16 };

const whole = await client.chat.completions.create(greedy);

let streamed = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  ...greedy,
  stream: true,
  stream_options: { include_usage: true },
})) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}

// A stream that is given up, and another answer after it.
const stopped = client.chat.completions.stream({ ...greedy, max_tokens: 500 });
await new Promise((resolve) => stopped.once("content", resolve));
stopped.abort();
await stopped.done().catch(() => {});

// The package's own loop calls the function; what that gave is told to the model, which goes on.
const called = [];
const runner = client.chat.completions.runTools(
  {
    ...greedy,
    max_tokens: 100,
    stream: true,
    tool_choice: { type: "function", function: { name: tools[0].function.name } },
    tools: [
      {
        ...tools[0],
        function: {
          ...tools[0].function,
          parse: JSON.parse,
          function: (given) => {
            called.push(given);
            return "Sunny";
          },
        },
      },
    ],
  },
  { maxChatCompletions: 2 },
);
await runner.done();
const after = await client.chat.completions.create({ ...greedy, messages: runner.messages, tools });

const shaped = await client.chat.completions.parse({
  ...greedy,
  max_tokens: 400,
  response_format: { type: "json_schema", json_schema: { name: "animal", schema } },
});

const response = await client.responses.create({ model, input: messages, temperature: 0, max_output_tokens: 16 });

async function problem(fields, kind) {
  try {
    await client.chat.completions.create({ ...greedy, ...fields });
  } catch (error) {
    return { known: error instanceof kind, status: error.status, code: error.code, param: error.param };
  }
}

console.log(
  JSON.stringify({
    models: (await client.models.list()).data.map((one) => one.id),
    whole: whole.choices[0].message.content,
    usage: whole.usage,
    streamed,
    streamedUsage: usage,
    called,
    roles: runner.messages.map((one) => one.role),
    after: after.choices[0].message.content,
    shaped: shaped.choices[0].message.content,
    response: response.output_text,
    wrongModel: await problem({ model: "another" }, NotFoundError),
    wrongField: await problem({ temperature: 3 }, BadRequestError),
  }),
);
