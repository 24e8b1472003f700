// Runs in the AI SDK's own environment: its chat models with tools, streams, a schema and a stop string.
// Arguments: base URL, model name. Prints one JSON object of what was seen.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, model] = process.argv.slice(2);
const QUESTION = "What is the weather in Lisbon?";
const place = z.object({ city: z.string() });
const weather = z.object({ sky: z.enum(["clear", "cloudy"]), warm: z.boolean() });

async function agent(chat) {
  const calls = [];
  const note = (name, result) =>
    tool({
      description: `Get the ${name} in a city.`,
      inputSchema: place,
      execute: async ({ city }) => (calls.push([`get_${name}`, city]), result),
    });
  const tools = { get_time: note("time", "12:00"), get_weather: note("weather", { temperature: 16, sky: "clear" }) };
  const common = { model: chat, tools, temperature: 0, maxOutputTokens: 128, maxRetries: 0, stopWhen: stepCountIs(4) };
  const messages = [{ role: "user", content: QUESTION }];
  const first = await generateText({ ...common, messages });
  messages.push(...first.response.messages, { role: "user", content: QUESTION });
  const second = streamText({ ...common, messages, onError: ({ error }) => { throw error; } });
  let text = "";
  for await (const piece of second.textStream) text += piece;
  messages.push(...(await second.response).messages, { role: "user", content: QUESTION });
  await generateText({ ...common, messages });
  return { calls, answers: [first.text, text] };
}

async function plain(chat) {
  const common = { model: chat, prompt: QUESTION, temperature: 0, maxRetries: 0 };
  const schema = await generateText({ ...common, maxOutputTokens: 200, output: Output.object({ schema: weather }) });
  const { text } = await generateText({ ...common, maxOutputTokens: 40 });
  const stop = text.slice(text.length / 2, text.length / 2 + 3);
  const stopped = await generateText({ ...common, maxOutputTokens: 40, stopSequences: [stop] });
  return { schema: schema.output, stopped: stopped.text === text.slice(0, text.indexOf(stop)) };
}

const models = {
  openai: createOpenAI({ baseURL, apiKey: "none" }).chat(model),
  compatible: createOpenAICompatible({ name: "divisi", baseURL, apiKey: "none", supportsStructuredOutputs: true })(model),
};
const seen = {};
for (const [name, chat] of Object.entries(models)) seen[name] = { ...(await agent(chat)), ...(await plain(chat)) };
console.log(JSON.stringify(seen));
