-- Client secrets: a worker reads them at the provider and seals them for the API process that asked.
--
--   api.request_client_secret      makes a row with the public key of the asking process, and the event for a worker
--   surety.open_secret_requests    what a worker finds of these rows
--   surety.answer_secret_requests  stores the sealed secret, and completes the event
--   api.take_client_secret         deletes the row, and gives its answer to the merchant that asked
--
-- Only these functions reach the rows, and each process may execute its own. So no other login can name a key for which
-- a worker would seal a secret, or answer in a worker's place. A notification could be forged by any login.

create or replace function surety.delete_old_secret_requests() returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with deleted as (
        delete from surety.client_secret_requests
        where ctid = any(array(
            select old.ctid from surety.client_secret_requests as old
            where old.requested_at < surety.time_now() - interval '1 minute'
            limit 1000
            for update skip locked
        ))
        returning client_secret_requests.id
    )

    select count(*)::integer from deleted;
end;

comment on function surety.delete_old_secret_requests() is
'Deletes requests for client secrets that are older than a minute: no process waits for them any more. Returns how
many, at most a thousand.';

create or replace function surety.open_secret_requests(p_batch bigint, p_fence bigint, p_event_ids text[])
returns table (
    event_id text, secret_request_id text, payment_id text, account text, provider_id text, livemode boolean,
    public_key bytea
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        events.event_id,
        requests.id,
        payments.id,
        payments.provider_account,
        payments.provider_id,
        payments.livemode,
        requests.public_key
    from outbox.batch_events(p_batch, p_fence) as events
    inner join surety.client_secret_requests as requests
        on events.payload ->> 'secret_request_id' = requests.id and events.aggregate_id = requests.payment_id
    inner join surety.payments on requests.payment_id = payments.id
    where
        events.event_id = any(p_event_ids) and requests.sealed is null and requests.failure is null
        and requests.requested_at >= surety.time_now() - interval '1 minute';
end;

comment on function surety.open_secret_requests(bigint, bigint, text[]) is
'The requests for client secrets behind these events of a batch that wait for an answer. The payment and the key are
those that api.request_client_secret wrote, whatever else the event says.';

create or replace function surety.answer_secret_requests(
    p_batch bigint, p_fence bigint, p_event_ids text[], p_answers jsonb
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    update surety.client_secret_requests as r
    set sealed = decode(a.sealed, 'base64'), failure = a.failure
    from jsonb_to_recordset(p_answers) as a (secret_request_id text, sealed text, failure text)
    where r.id = a.secret_request_id and r.sealed is null and r.failure is null;
    return outbox.complete_events(p_batch, p_fence, p_event_ids);
end;
$$;

comment on function surety.answer_secret_requests(bigint, bigint, text[], jsonb) is
'Answers requests for client secrets that are still there, and completes the events; false if the lease is lost, and the
caller rolls back. p_answers: [{secret_request_id, and sealed (base64) or failure}].';
