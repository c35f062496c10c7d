// A producer that is not Python: npm `celery-node`, as its own documentation says to use it.
//   node send.cjs REDIS_URL TASK RECORD_AS_JSON   prints the answer
const celery = require("celery-node");

const [url, task, record] = process.argv.slice(2);
const client = celery.createClient(url, url, "billing.commands");

client
  .createTask(task)
  .applyAsync([JSON.parse(record)])
  .get(20000)
  .then((answer) => console.log(JSON.stringify(answer)))
  .finally(() => client.disconnect());
