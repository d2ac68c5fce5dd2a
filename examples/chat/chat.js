// Sends a question and shows the answer as it comes, a character at a time.
const said = document.getElementById("said"), form = document.getElementById("ask"), input = document.getElementById("q");

function line(kind, text) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = text;
  said.append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = input.value.trim();
  if (!question) return;
  input.value = "";
  line("you", question);
  const answer = line("it", "");
  try {
    const response = await fetch("/say", { method: "POST", body: question });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) answer.textContent += part.value;
    if (response.status === 503) location.reload();
  } catch {
    answer.textContent = "The service does not answer.";
  }
});
