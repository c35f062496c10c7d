// A receiver that is not Python: npm `standardwebhooks`, as its own documentation says to use it.
//   node verify.cjs < {"secret", "headers", "body"}   prints the type of the event, or "refused"
const { Webhook, WebhookVerificationError } = require("standardwebhooks");
const { readFileSync } = require("fs");

const { secret, headers, body } = JSON.parse(readFileSync(0, "utf8"));
try {
  console.log(new Webhook(secret).verify(body, headers).type);
} catch (error) {
  if (!(error instanceof WebhookVerificationError)) throw error;
  console.log("refused");
}
